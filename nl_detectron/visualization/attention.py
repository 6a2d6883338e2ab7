"""Attention of non-local blocks: the affinity of single query positions.

Three coordinate systems are used:

* A *point* is (x, y) in pixels of the original image. Pixel i covers [i, i + 1).
* A *query position* is (row, column) in the input map of the block. Index i covers the pixels
  [i * stride, (i + 1) * stride) of the resized and padded image.
* A *target position* is (row, column) in the map that phi and g are computed at. The block sums
  over all target positions. With sub-sampling, this map has half the height and width of the
  input map and twice its stride; without, the two maps are the same.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.engine import DefaultPredictor
from torch import Tensor, nn

from ..errors import UserError
from ..layers import NonLocalBlock, affinity

_INSERTED = re.compile(r"(?:.+\.)?(\w+)\.nonlocal(\d+)")


@torch.no_grad()
def affinity_rows(block: NonLocalBlock, x: Tensor, indices: Tensor) -> Tensor:
    """Return ``block.affinity_matrix(x)[0, indices]`` without computing the rest of the matrix.

    Args:
        block: a non-local block.
        x: (B, C, *space), the input of the block; only the first image is used.
        indices: (K,), flat indices of query positions.

    Returns:
        (K, M), the weights f / C(x) of Eq. 1 for all M target positions. Rows of the two Gaussian
        functions sum to 1. Weights of the dot product can be negative.
    """
    theta, phi = block.embeddings(x[:1])
    matrix = getattr(affinity, f"{block.instantiation}_affinity")
    if block.instantiation == "dot_product":
        arguments = ()
    elif block.instantiation == "concatenation":
        arguments = (block.w_f,)
    else:
        arguments = (block.scale,)
    return matrix(theta[:, indices], phi, *arguments)[0]


def find_blocks(model: nn.Module) -> dict[str, NonLocalBlock]:
    """Return the non-local blocks that process whole images, by name.

    The name is the location: the block after residual block 4 of res4 is "res4.4". A block in
    another place has the name of its module, as does a second block with the same location.
    Blocks in RoI heads are left out because they process regions.
    """
    blocks = {}
    for module_name, module in model.named_modules():
        if isinstance(module, NonLocalBlock) and "roi_heads" not in module_name.split("."):
            inserted = _INSERTED.fullmatch(module_name)
            location = ".".join(inserted.groups()) if inserted else module_name
            blocks[module_name if location in blocks else location] = module
    if not blocks:
        raise UserError(
            "the model has no non-local block in its backbone (blocks in RoI heads do not count); "
            "is MODEL.BACKBONE.NAME build_nonlocal_backbone?"
        )
    return blocks


class AttentionRecorder:
    """Record the inputs of non-local blocks, so that attention can be computed afterwards.

    Use it as a context manager around a forward pass. The recorded inputs stay available after
    the context ends.

    Attributes:
        blocks (dict[str, NonLocalBlock]): the blocks, named as by :func:`find_blocks`.
        inputs (dict[str, Tensor]): (B, C, H, W), the last input of each block.
        padded_size (tuple[int, int]): height and width of the input of the backbone.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str] = ()):
        """
        Args:
            model: a detector or a backbone.
            blocks: names of the blocks to record, such as ``["res4.4"]``; all by default.
        """
        found = find_blocks(model)
        for name in blocks:
            if name not in found:
                raise UserError(f"no non-local block {name!r}; there are: {', '.join(found)}")
        self.blocks = {name: found[name] for name in (blocks or found)}
        self.inputs = {}
        self.padded_size = None
        self._backbone = getattr(model, "backbone", model)
        self._handles = []

    def __enter__(self) -> "AttentionRecorder":
        def save_size(_, inputs):
            self.padded_size = tuple(inputs[0].shape[-2:])

        def save_input(name, _, inputs):
            self.inputs[name] = inputs[0].detach()

        self._handles.append(self._backbone.register_forward_pre_hook(save_size))
        for name, block in self.blocks.items():
            self._handles.append(block.register_forward_pre_hook(partial(save_input, name)))
        return self

    def __exit__(self, *exception) -> None:
        while self._handles:
            self._handles.pop().remove()

    def map_size(self, name: str) -> tuple[int, int]:
        """Return the height and width of the map of query positions."""
        return tuple(self.inputs[name].shape[2:])

    def target_size(self, name: str) -> tuple[int, int]:
        """Return the height and width of the map of target positions."""
        ratio = 1 if self.blocks[name].subsample == "none" else 2
        return tuple(math.ceil(side / ratio) for side in self.map_size(name))

    def rows(self, name: str, positions: Tensor) -> Tensor:
        """Return the weights of all target positions for some query positions of the first image.

        Args:
            name: name of a block.
            positions: (K, 2) integers, query positions.

        Returns:
            (K, Hm, Wm) on the CPU.
        """
        height, width = self.map_size(name)
        if not ((positions >= 0) & (positions < torch.tensor([height, width]))).all():
            raise ValueError(f"a query position is outside the {height} x {width} map of {name}")
        x = self.inputs[name]
        indices = (positions[:, 0] * width + positions[:, 1]).to(x.device)
        rows = affinity_rows(self.blocks[name], x, indices)
        if not rows.isfinite().all():
            raise UserError(f"{name} has attention weights that are not finite")
        return rows.reshape(-1, *self.target_size(name)).cpu()


@dataclass(frozen=True)
class ImageGeometry:
    """Map points of an image to query positions of a block, and target positions to points.

    Attributes:
        image_size: height and width of the original image.
        resized_size: height and width after resizing. Padding is added below and on the right.
        stride: pixels of the resized image per query position.
        target_size: height and width of the map of target positions.
        target_stride: pixels of the resized image per target position.
    """

    image_size: tuple[int, int]
    resized_size: tuple[int, int]
    stride: int
    target_size: tuple[int, int]
    target_stride: int

    def query_positions(self, points: Tensor | Sequence[tuple[float, float]]) -> Tensor:
        """Return the query positions, (K, 2), that contain the points, (K, 2)."""
        points = torch.as_tensor(points, dtype=torch.float64).reshape(-1, 2)
        height, width = self.image_size
        for x, y in points.tolist():
            if not (0 <= x < width and 0 <= y < height):
                raise UserError(
                    f"({x:g}, {y:g}) is outside the image, which is {width} wide and {height} high"
                )
        return (points * self._scale().flip(0) / self.stride).long().flip(1)

    def target_points(self, targets: Tensor) -> Tensor:
        """Return the centres, as points (K, 2), of target positions, (K, 2).

        The centre of a position at the edge is that of its part inside the image.
        """
        start = targets.double() * self.target_stride
        end = (start + self.target_stride).minimum(torch.tensor(self.resized_size))
        return ((start + end) / 2 / self._scale()).flip(1)

    def in_image(self) -> Tensor:
        """Return (Hm, Wm), bool: False for target positions that cover nothing but padding."""
        y, x = (
            torch.arange(count) * self.target_stride < side
            for count, side in zip(self.target_size, self.resized_size)
        )
        return y[:, None] & x

    def padding_share(self, rows: Tensor) -> Tensor:
        """Return the share of the absolute weights in padding, (K,), of rows (K, Hm, Wm)."""
        magnitude = rows.abs()
        outside = (magnitude * ~self.in_image()).sum((1, 2))
        return outside / magnitude.sum((1, 2)).clamp(min=torch.finfo(rows.dtype).tiny)

    def heat_maps(self, rows: Tensor) -> Tensor:
        """Interpolate rows, (K, Hm, Wm), bilinearly to the size of the image: (K, H, W)."""
        y, x = (  # grid_sample's coordinates: -1 and 1 are the edges of the map
            (torch.arange(side).double() + 0.5) * scale / self.target_stride / count * 2 - 1
            for count, side, scale in zip(self.target_size, self.image_size, self._scale().tolist())
        )
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).to(rows)
        return F.grid_sample(rows[None], grid[None], padding_mode="border", align_corners=False)[0]

    def strongest(self, row: Tensor, count: int) -> list[tuple[float, float, float]]:
        """Return the target positions in the image with the largest absolute weights.

        Args:
            row: (Hm, Wm), weights of one query position.
            count: the maximum number of targets.

        Returns:
            x, y and weight of each, in descending order of absolute weight.
        """
        targets = self.in_image().nonzero()
        weights = row[targets[:, 0], targets[:, 1]]
        order = weights.abs().argsort(descending=True, stable=True)[:count]
        points = self.target_points(targets[order]).tolist()
        return [(x, y, weight) for (x, y), weight in zip(points, weights[order].tolist())]

    def _scale(self) -> Tensor:
        """Return (2,): pixels of the resized image per pixel of the original, in y and x."""
        sides = zip(self.resized_size, self.image_size)
        return torch.tensor([resized / side for resized, side in sides], dtype=torch.float64)


@dataclass(frozen=True)
class Attention:
    """The attention of a model's non-local blocks on one image.

    Attributes:
        image: (H, W, 3), uint8, BGR.
        predictions: output of the model, in pixels of the image.
        recorder: the recorder of the forward pass.
        geometry: geometry of each block.
    """

    image: np.ndarray
    predictions: dict[str, Any]
    recorder: AttentionRecorder
    geometry: dict[str, ImageGeometry]

    def rows(self, name: str, points: Tensor | Sequence[tuple[float, float]]) -> Tensor:
        """Return the weights of a block, (K, Hm, Wm), for points of the image, (K, 2)."""
        return self.recorder.rows(name, self.geometry[name].query_positions(points))


def attend(predictor: DefaultPredictor, image: np.ndarray, blocks: Sequence[str] = ()) -> Attention:
    """Run a model on an image and record the inputs of its non-local blocks.

    Args:
        predictor: detectron2's predictor; it resizes the image as its config says.
        image: (H, W, 3), uint8, BGR.
        blocks: names of the blocks to record, such as ``["res4.4"]``; all by default.
    """
    size = image.shape[:2]
    with AttentionRecorder(predictor.model, blocks) as recorder:
        predictions = predictor(image)
    resized = predictor.aug.get_transform(image).apply_image(image).shape[:2]
    geometry = {}
    for name, block in recorder.blocks.items():
        stride = find_stride(recorder.padded_size, recorder.map_size(name))
        target_stride = stride if block.subsample == "none" else 2 * stride
        target_size = recorder.target_size(name)
        geometry[name] = ImageGeometry(size, resized, stride, target_size, target_stride)
    return Attention(image, predictions, recorder, geometry)


def find_stride(padded_size: tuple[int, int], map_size: tuple[int, int]) -> int:
    """Return the power of two by which a network reduces an image of one size to the other."""
    for stride in (2**exponent for exponent in range(max(padded_size).bit_length() + 1)):
        if all(math.ceil(side / stride) == count for side, count in zip(padded_size, map_size)):
            return stride
    raise ValueError(f"the stride from {padded_size} to {map_size} is not a power of two")
