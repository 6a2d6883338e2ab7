"""Attention of non-local blocks: the affinity of single query positions.

A point is (x, y) in pixels of the original image; pixel i covers [i, i + 1). A query position is
(row, column) in the input map of the block, a target position in the map of phi and g, which
sub-sampling halves. Index i covers [i * stride, (i + 1) * stride) of the resized, padded image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from detectron2.engine import DefaultPredictor
from torch import Tensor, nn

from ..analysis.multiply_adds import padded_size
from ..errors import UserError
from ..layers import NonLocalBlock


def find_blocks(model: nn.Module) -> dict[str, NonLocalBlock]:
    """Return the non-local blocks that process whole images, by location, such as "res4.4".

    Other blocks, and a second block with the same location, have the names of their modules.
    """
    blocks = {}
    for name, module in model.named_modules():
        if isinstance(module, NonLocalBlock) and "roi_heads" not in name.split("."):
            stage, _, number = name.rpartition(".nonlocal")
            location = f"{stage.split('.')[-1]}.{number}" if stage else name
            blocks[name if location in blocks else location] = module
    if not blocks:
        raise UserError("no non-local block outside RoI heads: MODEL.BACKBONE.NAME inserts none")
    return blocks


class AttentionRecorder:
    """Context manager that records the inputs of non-local blocks, to compute attention later."""

    def __init__(self, model: nn.Module, blocks: Sequence[str] = ()):
        """Find the blocks with these names, as :func:`find_blocks` gives them; all by default."""
        found = find_blocks(model)
        if unknown := [name for name in blocks if name not in found]:
            raise UserError(f"no non-local block {unknown[0]!r}; there are: {', '.join(found)}")
        self.blocks = {name: found[name] for name in (blocks or found)}
        self.inputs: dict[str, Tensor] = {}  # (B, C, H, W), the last input of each block

    def __enter__(self) -> "AttentionRecorder":
        def save_input(name, _, inputs):
            self.inputs[name] = inputs[0].detach()

        self._handles = [
            block.register_forward_pre_hook(partial(save_input, name))
            for name, block in self.blocks.items()
        ]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def rows(self, name: str, positions: Tensor) -> Tensor:
        """Return weights f / C(x) of Eq. 1 for the first image, (K, Hm, Wm) on the CPU.

        They are the rows of ``block.affinity_matrix`` for the query positions, (K, 2) integers.
        """
        block, x = self.blocks[name], self.inputs[name][:1]
        height, width = x.shape[2:]
        rows = block.affinity_matrix(x, positions[:, 0] * width + positions[:, 1])[0]
        target_height = height if block.subsample == "none" else math.ceil(height / 2)
        return rows.unflatten(1, (target_height, -1)).cpu()


@dataclass(frozen=True)
class ImageGeometry:
    """Conversion of points of an image to positions in the maps of a block, and back."""

    image_size: tuple[int, int]  # height and width of the original image
    resized_size: tuple[int, int]  # height and width before padding below and on the right
    stride: int  # pixels of the resized image per query position
    target_stride: int  # pixels of the resized image per target position

    def query_positions(self, points: Tensor | Sequence[tuple[float, float]]) -> Tensor:
        """Return the query positions, (K, 2), that contain the points, (K, 2)."""
        points = torch.as_tensor(points, dtype=torch.float64).reshape(-1, 2)
        height, width = self.image_size
        for x, y in points.tolist():
            if not (0 <= x < width and 0 <= y < height):
                problem = f"({x:g}, {y:g}) is outside the image"
                raise UserError(f"{problem}, of {width} x {height} pixels")
        cell_size = torch.tensor(self.cell_size(self.stride), dtype=torch.float64)
        return (points / cell_size).long().flip(1)

    def cell_size(self, stride: int) -> tuple[float, float]:
        """Return the width and height of a position, in pixels of the image."""
        (height, width), (resized_height, resized_width) = self.image_size, self.resized_size
        return stride * width / resized_width, stride * height / resized_height

    def visible(self, stride: int) -> tuple[int, int]:
        """Return the numbers of rows and columns, in a map of this stride, that show the image."""
        height, width = self.resized_size
        return math.ceil(height / stride), math.ceil(width / stride)

    def padding_share(self, rows: Tensor) -> Tensor:
        """Return the share of the absolute weights in padding, (K,), of rows (K, Hm, Wm)."""
        height, width = self.visible(self.target_stride)
        padding = rows.abs()
        total = padding.sum((1, 2)).clamp(min=torch.finfo(rows.dtype).tiny)
        padding[:, :height, :width] = 0
        return padding.sum((1, 2)) / total

    def strongest(self, row: Tensor, count: int) -> list[tuple[float, float, float]]:
        """Return x, y and weight of the targets in a row, (Hm, Wm), with the largest weights.

        The point (x, y) is the centre of the part of the target that is inside the image.
        """
        height, width = self.visible(self.target_stride)
        weights = row[:height, :width].flatten()
        order = weights.abs().argsort(descending=True, stable=True)[:count]
        cells = torch.stack([order % width, order // width], dim=1)
        size = torch.tensor(self.cell_size(self.target_stride), dtype=torch.float64)
        end = ((cells + 1) * size).minimum(torch.tensor(self.image_size).flip(0))
        centres = (cells * size + end) / 2
        return [(*centre, w) for centre, w in zip(centres.tolist(), weights[order].tolist())]


@dataclass(frozen=True)
class Attention:
    """The attention of a model's non-local blocks on one image."""

    image: np.ndarray  # (H, W, 3), uint8, BGR
    predictions: dict  # output of the model, in pixels of the image
    recorder: AttentionRecorder
    geometry: dict[str, ImageGeometry]  # by name of the block

    def rows(self, name: str, points: Tensor | Sequence[tuple[float, float]]) -> Tensor:
        """Return the weights of a block, (K, Hm, Wm), for points of the image, (K, 2)."""
        return self.recorder.rows(name, self.geometry[name].query_positions(points))


def attend(predictor: DefaultPredictor, image: np.ndarray, blocks: Sequence[str] = ()) -> Attention:
    """Run a model on an image, (H, W, 3) uint8 BGR, and record the inputs of its non-local blocks.

    ``blocks`` are the names of those to record, such as ``["res4.4"]``; all by default.
    """
    with AttentionRecorder(predictor.model, blocks) as recorder:
        predictions = predictor(image)
    resized = predictor.aug.get_transform(image).apply_image(image).shape[:2]
    padded = padded_size(predictor.model, *resized)
    geometry = {}
    for name, block in recorder.blocks.items():
        # The strides of detectron2's networks are powers of two, and sizes are rounded up.
        ratio = max(padded) / max(recorder.inputs[name].shape[2:])
        stride = 2 ** math.ceil(math.log2(ratio))
        target_stride = stride if block.subsample == "none" else 2 * stride
        geometry[name] = ImageGeometry(image.shape[:2], resized, stride, target_stride)
    return Attention(image, predictions, recorder, geometry)
