"""What a non-local block looks at: its weights for single positions of an image.

Three systems of coordinates meet here. A *point* is (x, y) in pixels of the image as it was given,
where pixel i covers [i, i + 1). A *position* is (y, x), whole numbers, in the map that the block
gets. A *key* is a position that the block sums over: with sub-sampling, of a map half as high and
wide. Position i covers [i * stride, (i + 1) * stride) of the resized and padded image.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.engine import DefaultPredictor
from torch import Tensor, nn

from ..layers import NonLocalBlock, affinity

_INSERTED = re.compile(r"(?:.+\.)?(\w+)\.nonlocal(\d+)")
ROI_HEADS = "roi_heads"  # where detectron2's models keep what sees regions, not images


@torch.no_grad()
def affinity_rows(block: NonLocalBlock, x: Tensor, indices: Tensor) -> Tensor:
    """The rows ``block.affinity_matrix(x)[0, indices]``, without the rest of the matrix.

    Args:
        block: any.
        x: (B, C, *space), its input, of which the first image counts.
        indices: (K), integers, into the N positions of ``space`` in row-major order.

    Returns:
        (K, M), the weights f / C(x) of Eq. 1. Rows of the two Gaussian instantiations sum to 1;
        those of the concatenation are not negative, those of the dot product have any sign.
    """
    theta, phi = block.embeddings(x[:1])
    extra = {
        "gaussian": (block.scale,),
        "embedded_gaussian": (block.scale,),
        "dot_product": (),
        "concatenation": (block.w_f,),
    }
    weights = getattr(affinity, f"{block.instantiation}_affinity")
    return weights(theta[:, indices], phi, *extra[block.instantiation])[0]


def find_blocks(model: nn.Module) -> dict[str, NonLocalBlock]:
    """The non-local blocks that see whole images, by the place that ``LOCATION`` gives them.

    A block after residual block 4 of res4 is "res4.4". A block elsewhere, and a second one of the
    same place (in a model of two backbones), has the name of its module. Blocks in RoI heads are
    left out: their maps are of regions.

    Raises:
        ValueError: there is none.
    """
    blocks, in_heads = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, NonLocalBlock):
            continue
        if ROI_HEADS in name.split("."):
            in_heads.append(name)
            continue
        inserted = _INSERTED.fullmatch(name)
        place = ".".join(inserted.groups()) if inserted else name
        blocks[name if place in blocks else place] = module
    if not blocks:
        reason = "is MODEL.BACKBONE.NAME build_nonlocal_backbone?"
        if in_heads:
            reason = f"those in the RoI heads, {', '.join(in_heads)}, see regions, not the image"
        raise ValueError(f"the model has no non-local block in its backbone; {reason}")
    return blocks


class AttentionRecorder:
    """Keeps what non-local blocks got in the last forward pass, for their weights to be asked for.

    A context manager: hooks are there inside of it, what they kept stays after it.

    Attributes:
        blocks (dict[str, NonLocalBlock]): as :func:`find_blocks` names them.
        names (list[str]): of the blocks, in the order in which they run.
        inputs (dict[str, Tensor]): (B, C, H, W) of each block, after a forward pass.
        padded_size (tuple[int, int]): height, width of what the backbone got.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str] = ()):
        """
        Args:
            model: a detector, or a backbone.
            blocks: names of those that matter, by default all; such as ``["res4.4"]``.

        Raises:
            ValueError: there is no block, or none of that name.
        """
        found = find_blocks(model)
        for name in blocks:
            if name not in found:
                raise ValueError(f"no non-local block {name!r}; there are: {', '.join(found)}")
        self.blocks = {name: found[name] for name in (blocks or found)}
        self.names = list(self.blocks)
        self.inputs = {}
        self.padded_size = None
        self._backbone = getattr(model, "backbone", model)
        self._handles = []

    def __enter__(self) -> "AttentionRecorder":
        def record_size(_, inputs):
            self.padded_size = tuple(inputs[0].shape[-2:])

        self._handles.append(self._backbone.register_forward_pre_hook(record_size))
        for name, block in self.blocks.items():

            def record_input(_, inputs, name=name):
                self.inputs[name] = inputs[0].detach()

            self._handles.append(block.register_forward_pre_hook(record_input))
        return self

    def __exit__(self, *exception) -> None:
        while self._handles:
            self._handles.pop().remove()

    def map_size(self, name: str) -> tuple[int, int]:
        """Height and width of the positions of a block."""
        return tuple(self._input(name).shape[2:])

    def key_size(self, name: str) -> tuple[int, int]:
        """Height and width of its keys."""
        pooled = 1 if self.blocks[name].subsample == "none" else 2
        return tuple(math.ceil(side / pooled) for side in self.map_size(name))

    def rows(self, name: str, positions: Tensor) -> Tensor:
        """The weights of some positions of the first image, those rows of the matrix alone.

        Args:
            name: of a block.
            positions: (K, 2), integers, y and x.

        Returns:
            (K, Hm, Wm), over the keys.

        Raises:
            ValueError: nothing has run yet, or a position is not of the map.
        """
        height, width = self.map_size(name)
        size = torch.tensor([height, width])
        if not ((positions >= 0) & (positions < size)).all():
            raise ValueError(f"{name} has positions 0 to {height - 1}, 0 to {width - 1} (y, x)")
        x = self._input(name)
        indices = (positions[:, 0] * width + positions[:, 1]).to(x.device)
        rows = affinity_rows(self.blocks[name], x, indices)
        return rows.reshape(-1, *self.key_size(name)).cpu()

    def _input(self, name: str) -> Tensor:
        if name not in self.inputs:
            raise ValueError(f"{name} has not run while it was recorded")
        return self.inputs[name]


@dataclass(frozen=True)
class ImageGeometry:
    """From points of an image to a block's positions, and from its keys back.

    Attributes:
        image_size: height, width of the image as it was given.
        resized_size: of what the model makes of it; padding comes below and to the right.
        stride: of a position, in pixels of the resized image.
        key_size: height, width of the keys.
        key_stride: of a key.
    """

    image_size: tuple[int, int]
    resized_size: tuple[int, int]
    stride: int
    key_size: tuple[int, int]
    key_stride: int

    @classmethod
    def of(
        cls,
        recorder: AttentionRecorder,
        name: str,
        image_size: tuple[int, int],
        resized_size: tuple[int, int],
    ) -> "ImageGeometry":
        """That of a block after a forward pass."""
        map_size = recorder.map_size(name)
        stride = find_stride(recorder.padded_size, map_size)
        pooled = 1 if recorder.blocks[name].subsample == "none" else 2
        return cls(image_size, resized_size, stride, recorder.key_size(name), stride * pooled)

    def positions(self, points: Tensor) -> Tensor:
        """(K, 2) points -> (K, 2) positions that they lie in.

        Raises:
            ValueError: a point lies outside of the image.
        """
        points = torch.as_tensor(points, dtype=torch.float64).reshape(-1, 2)
        height, width = self.image_size
        for x, y in points.tolist():
            if not (0 <= x < width and 0 <= y < height):
                raise ValueError(
                    f"({x:g}, {y:g}) lies outside of the image, which is {width} wide and {height} "
                    "high"
                )
        cells = points * self._scale().flip(0) / self.stride
        return cells.long().flip(1)

    def points(self, keys: Tensor) -> Tensor:
        """(K, 2) keys, y and x -> (K, 2) points, each the middle of what the key covers.

        A key across the edge has the middle of its part in the image; one in the padding is
        outside.
        """
        resized = torch.tensor(self.resized_size, dtype=torch.float64)
        start = keys.double() * self.key_stride
        end = start + self.key_stride
        end = torch.where(start < resized, torch.minimum(end, resized), end)
        return ((start + end) / 2 / self._scale()).flip(1)

    def in_image(self) -> Tensor:
        """(Hm, Wm), bool: whether a key covers any pixel of the image, and not padding alone."""
        y, x = (
            torch.arange(count) * self.key_stride < side
            for count, side in zip(self.key_size, self.resized_size)
        )
        return y[:, None] & x

    def padding_share(self, rows: Tensor) -> Tensor:
        """(K, Hm, Wm) -> (K): how much of all weight, by magnitude, is given to padding alone."""
        magnitude = rows.abs()
        outside = (magnitude * ~self.in_image()).sum((1, 2))
        return outside / magnitude.sum((1, 2)).clamp(min=torch.finfo(rows.dtype).tiny)

    def heat_maps(self, rows: Tensor) -> Tensor:
        """(K, Hm, Wm) -> (K, H, W) over the image, interpolated linearly between keys' centres."""
        y, x = (
            _interpolation(count, torch.arange(side).add(0.5) * scale / self.key_stride)
            for count, side, scale in zip(self.key_size, self.image_size, self._scale().tolist())
        )
        return y.to(rows) @ rows @ x.to(rows).T

    def strongest(self, row: Tensor, count: int) -> list[tuple[float, float, float]]:
        """The keys in the image with the largest weights by magnitude, the largest first.

        Args:
            row: (Hm, Wm).
            count: how many; fewer where there are fewer.

        Returns:
            x, y and weight of each.
        """
        keys = self.in_image().nonzero()
        weights = row[keys[:, 0], keys[:, 1]]
        order = weights.abs().argsort(descending=True, stable=True)[:count]
        return [
            (x, y, weight)
            for (x, y), weight in zip(self.points(keys[order]).tolist(), weights[order].tolist())
        ]

    def _scale(self) -> Tensor:
        """y, x: pixels of the resized image in one of the image."""
        sides = zip(self.resized_size, self.image_size)
        return torch.tensor([resized / side for resized, side in sides], dtype=torch.float64)


@dataclass(frozen=True)
class Attention:
    """A model that has seen an image, and can be asked what its blocks looked at.

    Attributes:
        image: (H, W, 3), uint8, BGR.
        predictions: of the model, in pixels of the image; ``predictions["instances"]`` for one.
        recorder: of the forward pass.
        geometry: of each block.
    """

    image: np.ndarray
    predictions: dict[str, Any]
    recorder: AttentionRecorder
    geometry: dict[str, ImageGeometry]

    @property
    def names(self) -> list[str]:
        """Of the blocks."""
        return self.recorder.names

    def rows(self, name: str, points: Tensor | Sequence[tuple[float, float]]) -> Tensor:
        """The weights of a block for points of the image.

        Args:
            name: of a block.
            points: (K, 2), x and y.

        Returns:
            (K, Hm, Wm), over the keys; ``geometry[name]`` puts them on the image.

        Raises:
            ValueError: a point lies outside of the image.
        """
        return self.recorder.rows(name, self.geometry[name].positions(points))


def attend(predictor: DefaultPredictor, image: np.ndarray, blocks: Sequence[str] = ()) -> Attention:
    """Let a model see an image, and keep what its blocks need to be asked afterwards.

    Args:
        predictor: detectron2's, which resizes the image as the config says.
        image: (H, W, 3), uint8, BGR, as the predictor takes it.
        blocks: names of those that matter, by default all; such as ``["res4.4"]``.

    Raises:
        ValueError: the model has no block, or none of that name.
    """
    size = image.shape[:2]
    with AttentionRecorder(predictor.model, blocks) as recorder:
        predictions = predictor(image)
    resized = predictor.aug.get_transform(image).apply_image(image).shape[:2]
    geometry = {name: ImageGeometry.of(recorder, name, size, resized) for name in recorder.names}
    return Attention(image, predictions, recorder, geometry)


def find_stride(padded_size: tuple[int, int], map_size: tuple[int, int]) -> int:
    """The power of two by which an image of that size gives a map of that size.

    There is no other where the map has a side of 2 or more, for sides are halved and rounded up.

    Raises:
        ValueError: there is none.
    """
    for exponent in range(max(padded_size).bit_length() + 1):
        stride = 2**exponent
        if tuple(math.ceil(side / stride) for side in padded_size) == tuple(map_size):
            return stride
    raise ValueError(f"a map of {map_size} is not an image of {padded_size} by a power of two")


def _interpolation(count: int, coordinates: Tensor) -> Tensor:
    """(n, count): row i interpolates between ``count`` cells, at a coordinate in cells.

    The middle of cell j is at j + 0.5. Before the first and behind the last middle nothing changes.
    """
    x = (coordinates.double() - 0.5).clamp(0, count - 1)
    return (1 - (x[:, None] - torch.arange(count)).abs()).clamp(min=0)
