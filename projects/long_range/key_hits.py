#!/usr/bin/env python
"""Count how often the largest weight of a non-local block, asked at a lock, is on the lock's key.

The block is asked at the centre of the lock, and at all positions that overlap the lock's box, with
the mean of their weights. A weight is on the key if its position overlaps the key's box.
"""

import argparse
from collections.abc import Sequence
from typing import Optional

import long_range  # noqa: F401 - registers the backbones and the datasets
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from torch import Tensor
from tqdm import tqdm

from nl_detectron.engine import build_predictor, find_config_file, load_config
from nl_detectron.errors import exit_on_user_error
from nl_detectron.visualization import Attention, attend
from nl_detectron.visualization.attention import ImageGeometry


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="as for train_net.py")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE, such as MODEL.WEIGHTS")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        cfg = load_config(find_config_file(args.config_file), args.opts)
        predictor = build_predictor(cfg)
        for name in cfg.DATASETS.TEST:
            hits = {}  # block -> for each lock, as hits_key returns
            dataset, classes = DatasetCatalog.get(name), MetadataCatalog.get(name).thing_classes
            for image in tqdm(dataset, unit="image"):
                boxes = [(classes[a["category_id"]], _box(a)) for a in image["annotations"]]
                attention = attend(predictor, read_image(image["file_name"], "BGR"))
                for what, lock in boxes:
                    for block in attention.names if "lock" in what else ():
                        key = dict(boxes)[what.replace("lock", "key")]
                        hits.setdefault(block, []).append(hits_key(attention, block, lock, key))
            for block, of_locks in hits.items():
                centre, box, chance = (f"{sum(k) / len(of_locks):.1%}" for k in zip(*of_locks))
                print(f"{name}, {block}: {len(of_locks)} locks, {centre} from the centre, ", end="")
                print(f"{box} from the box, {chance} by chance")


def hits_key(
    attention: Attention, block: str, lock: Sequence[float], key: Sequence[float]
) -> tuple[bool, bool, float]:
    """Return whether a block attends to the key from a lock's centre and from its box.

    Args:
        attention: of the image.
        block: such as "res4.0".
        lock, key: boxes, x0, y0, x1, y1 in pixels of the image.

    Returns:
        The two answers, and the share of positions that are on the key.
    """
    geometry, recorder = attention.geometry[block], attention.recorder
    on_key = _covers(geometry, key, geometry.key_size, geometry.key_stride).flatten()
    on_lock = _covers(geometry, lock, recorder.map_size(block), geometry.stride)
    x0, y0, x1, y1 = lock
    from_centre = attention.rows(block, [((x0 + x1) / 2, (y0 + y1) / 2)])
    from_box = recorder.rows(block, on_lock.nonzero()).mean(dim=0, keepdim=True)
    largest = torch.cat([from_centre, from_box]).abs().flatten(1).argmax(dim=1)
    return *on_key[largest].tolist(), on_key.double().mean().item()


def _covers(
    geometry: ImageGeometry, box: Sequence[float], size: tuple[int, int], stride: int
) -> Tensor:
    """Return a mask of the positions of a map that overlap a box, (H, W), bool."""
    x0, y0, x1, y1 = box
    sides = zip(size, geometry.image_size, geometry.resized_size, (y0, x0), (y1, x1))
    inside = []
    for count, image_side, resized_side, start, end in sides:
        edges = torch.arange(count + 1).double() * stride * image_side / resized_side
        inside.append((edges[:-1] < end) & (edges[1:] > start))
    return inside[0][:, None] & inside[1]


def _box(annotation: dict) -> list[float]:
    return BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)


if __name__ == "__main__":
    main()
