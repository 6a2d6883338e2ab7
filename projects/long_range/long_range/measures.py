"""Measures of a trained network: AP50 of the locks, attention on keys, cost."""

import contextlib
import io
from collections.abc import Sequence

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from nl_detectron.analysis import count_multiply_adds
from nl_detectron.layers.affinity import query_difference

from .model import STRIDE, RecallNet
from .recall import COLOURS, HEIGHT, KEYS, WIDTH, dataset_root
from .training import Images, predict


def measure(net: RecallNet, blocks: Sequence[nn.Module], images: Images) -> dict[str, float]:
    """Return all measures; with several blocks, those of the block with most hits of own keys."""
    colours = predict(net, images)[1]
    keys = colours.shape[1] // 2
    backbone = net.backbone.eval()
    image = torch.zeros(1, 3, HEIGHT, WIDTH, device=images.pixels.device)
    measured = {
        "locks AP50": locks_ap50(colours[:, keys:].softmax(dim=2), keys),
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "multiply-adds": count_multiply_adds(backbone, image),
    }
    found = []
    for block in blocks:
        if hasattr(block, "affinity_matrix"):
            rows, targets = lock_attention(net, block, images)
            found.append((hits(targets, images), query_difference(rows).item()))
    return measured | dict(zip(("on key", "difference"), max(found, default=())))


def locks_ap50(scores: Tensor, keys: int) -> float:
    """Return the AP50 of the locks, in percent, for their true boxes with scores (N, K, 4)."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(dataset_root(keys) / "val.json")
        locks = [a for a in truth.dataset["annotations"] if "key" in a]
        detections = [
            {**lock, "category_id": len(KEYS) + 1 + colour, "score": score}
            for lock, of_lock in zip(locks, scores.flatten(0, 1).tolist())
            for colour, score in enumerate(of_lock)
        ]
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.params.catIds = truth.getCatIds()[len(KEYS) :]
        for name in ("iouThrs", "areaRng", "areaRngLbl"):  # 0.5, all sizes
            setattr(evaluation.params, name, getattr(evaluation.params, name)[:1])
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, -1]  # recall, class
    return 100 * precision[:, precision[0] > -1].mean().item()


def guess(images: Images, colours: bool, seed: int) -> Tensor:
    """Return scores (N, K, 4) that are random, or know how many keys have each colour."""
    keys = images.colours.shape[1] // 2
    known = nn.functional.one_hot(images.colours[:, :keys], len(COLOURS)).float()
    noise = torch.rand(known.shape, generator=torch.Generator().manual_seed(seed))
    return noise / 2 + (known.sum(dim=1, keepdim=True) if colours else 0)


@torch.no_grad()
def lock_attention(net: RecallNet, block: nn.Module, images: Images) -> tuple[Tensor, Tensor]:
    """Return the affinity rows (N, K, M) of the locks, and the x, y (N, K, 2) of their maxima."""
    inputs = []
    hook = block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    predict(net, images)
    hook.remove()
    x = torch.cat(inputs)
    x_lock, y_lock = (images.centres().chunk(2, dim=1)[1] // STRIDE).long().unbind(dim=2)
    queries = (y_lock * x.shape[3] + x_lock).unsqueeze(2)
    matrix = block.affinity_matrix(x)
    rows = matrix.gather(1, queries.expand(-1, -1, matrix.shape[2]))
    stride = STRIDE if block.subsample == "none" else 2 * STRIDE
    strongest, columns = rows.argmax(dim=2), WIDTH // stride
    targets = torch.stack([strongest % columns, strongest // columns], dim=2)
    return rows, (targets + 0.5) * stride


def hits(targets: Tensor, images: Images) -> float:
    """Return the percentage of targets that are nearer to the own key than to all other objects."""
    nearest = torch.cdist(targets, images.centres()).argmin(dim=2)
    own = torch.arange(nearest.shape[1], device=nearest.device)
    return 100 * (nearest == own).float().mean().item()
