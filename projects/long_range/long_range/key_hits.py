"""Whether a block, asked from a lock of the synthetic data, looks at the key."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import BoxMode
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from ..data.synthetic import KEYS, LOCKS
from .attention import ImageGeometry, attend

QUERIES = ("from its centre", "mean over its box")


@dataclass(frozen=True)
class KeyHits:
    """How often the strongest key of a block, padding included, covers any of the object "key".

    Objects are taken by their boxes as they are annotated.

    Attributes:
        locks: class of a lock -> how many there are.
        hits: class of a lock -> how many of them hit, for each of :data:`QUERIES`.
        images: how many have a lock.
        image_hits: in how many of these all locks hit, for each of :data:`QUERIES`.
        chance: the share of locks that would hit if one key of the block were drawn from all.
    """

    locks: dict[str, int]
    hits: dict[str, tuple[int, int]]
    images: int
    image_hits: tuple[int, int]
    chance: float

    def table(self, title: str) -> str:
        """As Markdown."""
        names = list(self.locks)
        rows = [(name, self.locks[name], self.hits[name]) for name in names]
        total = tuple(map(sum, zip(*self.hits.values())))
        rows.append(("all locks", sum(self.locks.values()), total))
        rows.append(("images, all locks hit", self.images, self.image_hits))
        cells = [
            [name, count, *(f"{hit} ({hit / count:.1%})" for hit in hits)]
            for name, count, hits in rows
        ]
        cells.insert(len(names) + 1, ["by chance", "", *[f"({self.chance:.1%})"] * len(QUERIES)])
        headers = [title, "number", *QUERIES]
        return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def key_hits(
    predictor: DefaultPredictor, dataset: Sequence[dict], classes: Sequence[str], block: str
) -> KeyHits:
    """Ask a block from every lock what it looks at.

    From its centre; and from all positions that cover any of its box, by the mean of their weights,
    for a detector's heads see all of these.

    Args:
        predictor: of a model with that block.
        dataset: in detectron2's format, of images with one key each, such as
            ``DatasetCatalog.get("nl_synthetic_val")``.
        classes: the metadata's ``thing_classes``; of the names that the synthetic data has.
        block: its name, such as "res4.0".

    Raises:
        ValueError: there is no such block, or there are no locks in the dataset.
    """
    hits = {name: [] for name in LOCKS}  # (2), bool, for each lock
    images, chances = [], []
    for record in tqdm(dataset, desc="looking", unit="image"):
        annotations = [(classes[a["category_id"]], _box(a)) for a in record["annotations"]]
        locks = [(name, box) for name, box in annotations if name in LOCKS]
        if not locks:
            continue
        (target,) = (box for name, box in annotations if name in KEYS)
        attention = attend(predictor, read_image(record["file_name"], "BGR"), [block])
        geometry, recorder = attention.geometry[block], attention.recorder
        at_target = covering(geometry, target, geometry.key_size, geometry.key_stride).flatten()
        in_image = []
        for name, (x0, y0, x1, y1) in locks:
            centre = attention.rows(block, [((x0 + x1) / 2, (y0 + y1) / 2)])
            box = (x0, y0, x1, y1)
            positions = covering(geometry, box, recorder.map_size(block), geometry.stride)
            whole = recorder.rows(block, positions.nonzero()).mean(0, keepdim=True)
            strongest = torch.cat([centre, whole]).abs().flatten(1).argmax(1)
            in_image.append(at_target[strongest])
            hits[name].append(at_target[strongest])
            chances.append(at_target.double().mean().item())
        images.append(torch.stack(in_image).all(0))
    if not images:
        raise ValueError("the dataset has no locks; this is for nl_detectron's synthetic data")
    hits = {name: torch.stack(of_class) for name, of_class in hits.items() if of_class}
    return KeyHits(
        locks={name: len(of_class) for name, of_class in hits.items()},
        hits={name: tuple(of_class.sum(0).tolist()) for name, of_class in hits.items()},
        images=len(images),
        image_hits=tuple(torch.stack(images).sum(0).tolist()),
        chance=sum(chances) / len(chances),
    )


def covering(
    geometry: ImageGeometry, box: Sequence[float], size: tuple[int, int], stride: int
) -> Tensor:
    """(H, W) of ``size``, bool: which positions, or keys, cover any of a box.

    Args:
        geometry: of the block.
        box: x0, y0, x1, y1 in pixels of the image.
        size: height, width of the map.
        stride: of it.
    """
    x0, y0, x1, y1 = box
    inside = []
    for count, side, resized, start, end in zip(
        size, geometry.image_size, geometry.resized_size, (y0, x0), (y1, x1)
    ):
        edges = torch.arange(count + 1, dtype=torch.float64) * stride * side / resized
        inside.append((edges[:-1] < end) & (edges[1:] > start))
    return inside[0][:, None] & inside[1]


def _box(annotation: dict) -> list[float]:
    return BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
