#!/usr/bin/env python3
"""Draw the attention of a model's non-local blocks, as in Fig. 3 of the paper.

For each image and each block, write OUTPUT/<image>_<block>.png: for each query, the image with
arrows to the targets with the largest weights, and a map of all weights. With --html, write an
interactive page instead, on which the query follows the pointer.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from nl_detectron.engine import build_predictor, find_config_file, load_config
from nl_detectron.errors import UserError, exit_on_user_error
from nl_detectron.files import write_atomically
from nl_detectron.visualization import Attention, attend
from nl_detectron.visualization.attention_page import attention_page
from nl_detectron.visualization.figure import draw_attention, draw_objects
from nl_detectron.visualization.predictions import THRESHOLDS, read_image

# isort: split
# After nl_detectron, which silences a warning of torch that importing detectron2 causes.
from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

MAX_BOXES = 12


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="same as for train_net.py")
    add("--input", required=True, nargs="+", type=Path, metavar="IMAGE")
    add("--confidence-threshold", type=float, default=0.5, metavar="P", help="default: 0.5")
    add("--block", metavar="NAME", help="for example res4.4; default: all blocks")
    add("--arrows", type=int, default=20, metavar="N", help="per query; default: 20")
    add("--output", type=Path, default=Path("output/attention"), metavar="DIR")
    add("--format", choices=("png", "webp", "pdf", "svg"), default="png", help="default: png")
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, such as MODEL.WEIGHTS FILE")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--query", action="append", type=point, metavar="X,Y", help="in pixels; may be repeated")
    add("--query-boxes", action="store_true", help=f"centres of up to {MAX_BOXES} detections")
    add("--query-grid", type=grid, metavar="RxC", help="centres of the cells of an R x C grid")
    add("--html", type=Path, metavar="FILE", help="write a page for one image instead")
    args = parser.parse_args(argv)
    if args.html and len(args.input) > 1:
        parser.error(f"--html {args.html}: a page has one image, not {len(args.input)}")
    if len({path.stem for path in args.input}) < len(args.input):
        parser.error("--input: two images have the same name")
    return args


def point(text: str) -> tuple[float, float]:
    x, y = map(float, text.split(","))
    return x, y


def grid(text: str) -> tuple[int, int]:
    rows, columns = map(int, text.split("x"))
    return rows, columns


def draw(args: argparse.Namespace, path: Path, attention: Attention, metadata: Metadata) -> None:
    """Write one figure per block."""
    height, width = attention.image.shape[:2]
    points, pictures = args.query, []
    if args.query_grid:
        rows, columns = args.query_grid
        centres = torch.cartesian_prod(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5)
        points = [(x * width / columns, y * height / rows) for y, x in centres.tolist()]
    if args.query_boxes:
        if "instances" not in attention.predictions:
            raise UserError("--query-boxes: this model does not detect objects; use --query X,Y")
        found = attention.predictions["instances"][:MAX_BOXES].to("cpu")
        print(f"{path}: {len(found)} detections")
        edge = torch.tensor([width, height]) - 0.01
        points = found.pred_boxes.get_centers().minimum(edge).tolist()
        image, names = attention.image[:, :, ::-1], metadata.get("thing_classes", ())
        for detection in instances_to_coco_json(found, img_id=0):
            picture = draw_objects(image, [detection], dict(enumerate(names)), metadata)
            pictures.append(picture)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in attention.geometry if points else ():
        figure = draw_attention(attention, name, points, arrows=args.arrows, pictures=pictures)
        file = args.output / f"{path.stem}_{name}.{args.format}"
        with write_atomically(file, "wb") as stream:
            figure.savefig(stream, format=args.format, dpi=110)
        print(file)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_user_error():
        images = {path: read_image(path) for path in args.input}
        thresholds = [part for key in THRESHOLDS for part in (key, args.confidence_threshold)]
        cfg = load_config(find_config_file(args.config_file), args.opts, overrides=thresholds)
        predictor = build_predictor(cfg)
        if not cfg.MODEL.WEIGHTS:
            print("note: MODEL.WEIGHTS is empty; the weights are random", file=sys.stderr)
        metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "__unused")
        for path, image in images.items():
            attention = attend(predictor, image, [args.block] if args.block else [])
            if not args.html:
                draw(args, path, attention, metadata)
                continue
            found = attention.predictions.get("instances")
            classes = metadata.get("thing_classes", ())
            with write_atomically(args.html, "w") as file:
                file.write(attention_page(attention, path.name, found, classes))
            print(args.html)


if __name__ == "__main__":
    main()
