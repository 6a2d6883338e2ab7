"""What is measured of a trained network: AP50 of the locks, attention on keys, cost."""

import contextlib
import io
from collections.abc import Sequence

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from nl_detectron.analysis import count_multiply_adds
from nl_detectron.layers import affinity

from .model import STRIDE, RecallNet
from .recall import COLOURS, HEIGHT, KEYS, WIDTH, dataset_root
from .training import Images


def locks_ap50(scores: Tensor, keys: int) -> float:
    """Return the AP50, in percent, of detections of all colours in the true boxes of the locks.

    Args:
        scores: (N, K, 4), of the colours of the locks in the validation images with K keys.
    """
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
        evaluation.params.iouThrs = evaluation.params.iouThrs[:1]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, -1]  # recall, class; all sizes
    return 100 * precision[:, precision[0] > -1].mean().item()


def guess(images: Images, knowledge: str, seed: int) -> Tensor:
    """Return scores (N, K, 4) of a classifier that knows "nothing", "colours" or "everything".

    With "colours" it knows how many keys of the image have each colour, and not which.
    """
    keys = images.colours.shape[1] // 2
    true = nn.functional.one_hot(images.colours[:, :keys], len(COLOURS)).float()
    if knowledge == "everything":
        return true
    noise = torch.rand(true.shape, generator=torch.Generator().manual_seed(seed))
    counts = true.mean(dim=1, keepdim=True) if knowledge == "colours" else 0
    return counts + 1e-3 * noise  # ties are broken at random


@torch.no_grad()
def attention_on_keys(
    net: RecallNet, blocks: Sequence[nn.Module], images: Images
) -> tuple[float, float]:
    """Return the percentage of locks whose strongest attention is on their key, and how queries differ.

    The queries are the positions at the centres of the locks. A hit is a strongest weight whose
    position is nearer to the centre of the lock's key than to that of any other object. Of several
    blocks, those numbers are returned of the block that hits most often.
    """
    inputs = []
    hooks = [b.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for b in blocks]
    net.eval()
    net(images.pixels, images.boxes)
    net.train()
    for hook in hooks:
        hook.remove()

    keys = images.boxes.shape[1] // 2
    centres = (images.boxes[:, :, :2] + images.boxes[:, :, 2:]) / 2
    found = []
    for block, x in zip(blocks, inputs):
        width = x.shape[3]
        stride = STRIDE if block.subsample == "none" else 2 * STRIDE
        columns = -(-WIDTH // stride)
        cells = (centres[:, keys:] / STRIDE).long()
        queries = cells[:, :, 1] * width + cells[:, :, 0]
        matrix = block.affinity_matrix(x)
        rows = matrix.gather(1, queries.unsqueeze(2).expand(-1, -1, matrix.shape[2]))
        strongest = rows.argmax(dim=2)
        target = torch.stack([strongest % columns, strongest // columns], dim=2) * stride
        distances = torch.cdist(target + stride / 2, centres)
        own = torch.arange(keys, device=x.device)
        hits = (distances.argmin(dim=2) == own).float().mean()
        found.append((100 * hits.item(), affinity.query_difference(rows).item()))
    return max(found)


def cost(net: RecallNet) -> dict[str, int]:
    """Return the parameters of the backbone, and its multiply-adds on one image."""
    image = torch.zeros(1, 3, HEIGHT, WIDTH, device=next(net.parameters()).device)
    net.eval()
    multiply_adds = count_multiply_adds(net.backbone, image)
    net.train()
    parameters = sum(parameter.numel() for parameter in net.backbone.parameters())
    return {"parameters": parameters, "multiply-adds": multiply_adds}
