"""Train the networks of a row, on images that stay in the memory of the device."""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from PIL import Image
from torch import Tensor, nn

from nl_detectron import add_nonlocal_config, insert_nonlocal
from nl_detectron.modeling import build_optimizer

from . import rows
from .model import RecallNet
from .recall import dataset_root
from .rows import Row

EVALUATE_EVERY = 50  # iterations


class Images(NamedTuple):
    """Images of a dataset. Objects 0 to K - 1 of an image are keys; object K + i is a lock."""

    pixels: Tensor  # (N, 3, H, W), uint8
    boxes: Tensor  # (N, 2 K, 4), x0, y0, x1, y1
    glyphs: Tensor  # (N, 2 K)
    colours: Tensor  # (N, 2 K); of a lock, the colour of its key

    def centres(self) -> Tensor:
        """Return x and y of the centres of the boxes, (N, 2 K, 2)."""
        return (self.boxes[:, :, :2] + self.boxes[:, :, 2:]) / 2

    def select(self, index: Tensor | slice) -> "Images":
        return Images(*(tensor[index] for tensor in self))

    def to(self, device: str) -> "Images":
        return Images(*(tensor.to(device) for tensor in self))


def load_images(keys: int, split: str) -> Images:
    """Read a dataset with K keys, which is generated if it does not exist."""
    root = dataset_root(keys)
    dataset = json.loads((root / f"{split}.json").read_text())
    paths = [root / split / image["file_name"] for image in dataset["images"]]
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])

    def field(name: str) -> Tensor:
        of_all = torch.tensor([annotation[name] for annotation in dataset["annotations"]])
        return of_all.reshape(len(paths), 2 * keys, *of_all.shape[1:])

    boxes = field("bbox").float()
    boxes[:, :, 2:] += boxes[:, :, :2]
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, boxes, field("glyph"), field("colour"))


def build_net(row: Row, seed: int, weights: dict | None = None) -> tuple[RecallNet, list]:
    """Build the network of a row, from the weights of a warm-up if given, and return its blocks."""
    torch.manual_seed(seed)
    net = RecallNet(row.depth)
    if weights is not None:
        net.load_state_dict(weights)
    names = []
    if row.block is not None:
        names = insert_nonlocal(net.backbone, row.location, block=row.block, **row.options)
    return net, [net.backbone.get_submodule(name) for name in names]


def train(
    nets: dict[int, RecallNet], row: Row, images: Images, validation: Images | None = None
) -> dict[int, list[float]]:
    """Train networks, seed -> network, and return their accuracies at locks every 50 iterations."""
    steps = [_make_step(net, row, seed, images) for seed, net in nets.items()]
    some = validation and validation.select(slice(100))
    accuracies: dict[int, list[Tensor]] = {seed: [] for seed in nets}
    for i in range(1, row.iterations + 1):
        if images.pixels.is_cuda and i == 4:  # the first iterations set up the optimizer
            steps = [_capture(steps)]
        for step in steps:
            step()
        if some and i % EVALUATE_EVERY == 0:
            for seed, net in nets.items():
                right = predict(net, some)[1].argmax(dim=2) == some.colours
                accuracies[seed].append(right[:, row.keys :].float().mean())
    return {seed: [round(a.item(), 4) for a in values] for seed, values in accuracies.items()}


@torch.no_grad()
def predict(net: RecallNet, images: Images) -> tuple[Tensor, Tensor]:
    """Return the logits of glyphs and colours for all images, in evaluation mode."""
    net.eval()
    parts = zip(images.pixels.split(100), images.boxes.split(100))
    glyphs, colours = zip(*(net(*part) for part in parts))
    net.train()
    return torch.cat(glyphs), torch.cat(colours)


def _make_step(net: RecallNet, row: Row, seed: int, images: Images) -> Callable[[], None]:
    """Return a function that runs the next iteration without waiting for the device."""
    device = images.pixels.device
    generator = torch.Generator().manual_seed(1000 * seed + row.warm_up)
    size = row.iterations, rows.BATCH
    batches = torch.randint(len(images.pixels), size, generator=generator).to(device)
    iterations = torch.arange(1, row.iterations + 1, device=device)
    factors = (iterations / rows.RAMP).clamp(max=1)  # of the learning rate
    factors[iterations > rows.DECAY_AT * row.iterations] *= 0.1
    done = torch.zeros(1, dtype=torch.long, device=device)
    optimizer = _build_optimizer(net, row)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], device=device)
        if images.pixels.is_cuda:
            group.update(foreach=False, fused=True, capturable=True)

    def step() -> None:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"].copy_(rate * factors[done].squeeze(0))
        optimizer.zero_grad()
        _loss(net, images.select(batches[done].squeeze(0)), row.lock_glyphs).backward()
        nn.utils.clip_grad_norm_(net.parameters(), rows.CLIP)
        optimizer.step()
        done.add_(1)

    return step


def _capture(steps: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """Record the steps in a CUDA graph, in parallel, as most kernels use a small part of a GPU."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        main = torch.cuda.current_stream()
        streams = [torch.cuda.Stream() for _ in steps]
        for step, stream in zip(steps, streams):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                step()
        for stream in streams:
            main.wait_stream(stream)
    return graph.replay


def _loss(net: RecallNet, images: Images, lock_glyphs: bool) -> Tensor:
    glyphs, colours = net(images.pixels, images.boxes)
    n = glyphs.shape[1] if lock_glyphs else glyphs.shape[1] // 2
    glyph_loss = F.cross_entropy(glyphs[:, :n].flatten(0, 1), images.glyphs[:, :n].flatten())
    return glyph_loss + F.cross_entropy(colours.flatten(0, 1), images.colours.flatten())


def _build_optimizer(net: RecallNet, row: Row) -> torch.optim.Optimizer:
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.SOLVER.OPTIMIZER = row.optimizer
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = rows.OPTIMIZERS[row.optimizer]
    cfg.SOLVER.NONLOCAL_LR_FACTOR = row.lr_factor
    optimizer = build_optimizer(cfg, net)
    merged = {}  # detectron2 0.5 has a group for each parameter, which is slow on a GPU
    for group in optimizer.param_groups:
        key = group["lr"], group["weight_decay"]
        merged.setdefault(key, {**group, "params": []})["params"] += group["params"]
    optimizer.param_groups = list(merged.values())
    return optimizer
