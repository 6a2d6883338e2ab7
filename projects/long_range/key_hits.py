#!/usr/bin/env python
"""Count how often the largest weight of a non-local block, asked at a lock, is on the lock's key.

The block is asked at the centre of the lock, and at all positions that overlap the lock's box, with
the mean of their weights. A weight is on the key if its position overlaps the key's box.
"""

import argparse
from collections import defaultdict
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

XYXY = BoxMode.XYXY_ABS
Box = Sequence[float]  # x0, y0, x1, y1 in pixels of the image


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="as for train_net.py")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE, such as MODEL.WEIGHTS")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        cfg = load_config(find_config_file(args.config_file), args.opts)
        predictor = build_predictor(cfg)
        for name in cfg.DATASETS.TEST:
            dataset, classes = DatasetCatalog.get(name), MetadataCatalog.get(name).thing_classes
            hits = defaultdict(list)  # block -> one item per lock
            for image in tqdm(dataset, unit="image"):
                objects = [
                    (classes[a["category_id"]], BoxMode.convert(a["bbox"], a["bbox_mode"], XYXY))
                    for a in image["annotations"]
                ]
                attention = attend(predictor, read_image(image["file_name"], "BGR"))
                for what, lock in objects:
                    for block in attention.geometry if "lock" in what else ():
                        key = dict(objects)[what.replace("lock", "key")]
                        hits[block].append(hits_key(attention, block, lock, key))
            for block, of_locks in hits.items():
                centre, box, chance = (f"{sum(k) / len(of_locks):.1%}" for k in zip(*of_locks))
                rates = f"from centre {centre}, from box {box}, by chance {chance}"
                print(f"{name}, {block}, {len(of_locks)} locks: {rates}")


def hits_key(attention: Attention, block: str, lock: Box, key: Box) -> tuple[bool, bool, float]:
    """Return whether a block attends to the key, and the share of positions that are on the key.

    The first answer is for the centre of the lock, and the second for its box.
    """
    geometry, recorder = attention.geometry[block], attention.recorder
    on_lock = _overlaps(geometry, lock, recorder.map_size(block), geometry.stride)
    x0, y0, x1, y1 = lock
    from_centre = attention.rows(block, [((x0 + x1) / 2, (y0 + y1) / 2)])
    from_box = recorder.rows(block, on_lock.nonzero()).mean(dim=0, keepdim=True)
    largest = torch.cat([from_centre, from_box]).abs().flatten(1).argmax(dim=1)
    size = from_centre.shape[1:]  # with sub-sampling, half of the map's
    stride = geometry.stride * (1 if size == on_lock.shape else 2)
    on_key = _overlaps(geometry, key, size, stride).flatten()
    return *on_key[largest].tolist(), on_key.double().mean().item()


def _overlaps(geometry: ImageGeometry, box: Box, size: tuple[int, int], stride: int) -> Tensor:
    """Return a mask of the positions of a map that overlap a box, (H, W), bool."""
    (height, width), (resized_height, resized_width) = geometry.image_size, geometry.resized_size
    y = torch.arange(size[0] + 1).double() * stride * height / resized_height
    x = torch.arange(size[1] + 1).double() * stride * width / resized_width
    x0, y0, x1, y1 = box
    return ((y[:-1] < y1) & (y[1:] > y0))[:, None] & (x[:-1] < x1) & (x[1:] > x0)


if __name__ == "__main__":
    main()
