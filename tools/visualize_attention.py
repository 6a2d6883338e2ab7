#!/usr/bin/env python3
"""Draw what the non-local blocks of a model look at, as Fig. 3 of the paper does.

Each image and each block gives one picture, OUTPUT/<image>_<block>.png: for each query the image
with arrows to the positions that have the largest weights, and a map of all weights. --html gives a
page instead, on which the pointer is the query.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog

from nl_detectron.engine import load_config
from nl_detectron.engine.predictor import build_predictor
from nl_detectron.engine.setup import find_config_file
from nl_detectron.errors import UserError, as_user_error, exit_on_user_error
from nl_detectron.visualization import Attention, AttentionRecorder, attend
from nl_detectron.visualization.figure import draw_attention, draw_detection
from nl_detectron.visualization.images import InputError, read
from nl_detectron.visualization.page import attention_page

MAX_BOXES = 12
FORMATS = ("png", "webp", "pdf", "svg")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="as of train_net.py")
    parser.add_argument("--input", required=True, nargs="+", type=Path, metavar="IMAGE")
    queries = parser.add_mutually_exclusive_group(required=True)
    queries.add_argument(
        "--query",
        action="append",
        type=point,
        metavar="X,Y",
        help="in pixels of the image; can be given several times",
    )
    queries.add_argument(
        "--query-boxes",
        action="store_true",
        help=f"the centre of each detection, of at most {MAX_BOXES}, drawn with it",
    )
    queries.add_argument(
        "--query-grid", type=grid, metavar="RxC", help="the centres of R rows of C equal parts"
    )
    queries.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="not pictures but a page to write, for one image, where the pointer is the query",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        help="of the detections of --query-boxes and --html; default: 0.5",
    )
    parser.add_argument("--block", metavar="NAME", help="such as res4.4; by default all of them")
    parser.add_argument("--arrows", type=positive, default=20, metavar="N", help="default: 20")
    parser.add_argument("--output", type=Path, default=Path("output/attention"), metavar="DIR")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="default: png")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, such as MODEL.WEIGHTS FILE"
    )
    args = parser.parse_args()
    if args.html and len(args.input) > 1:
        parser.error(f"--html {args.html}: a page has one image, not {len(args.input)}")
    if args.html and not args.html.parent.is_dir():
        parser.error(f"--html {args.html}: there is no folder {args.html.parent}")
    return args


def point(text: str) -> tuple[float, float]:
    """ "120,80.5" -> (120.0, 80.5)."""
    x, y = map(float, text.split(","))
    return x, y


def grid(text: str) -> tuple[int, int]:
    """ "2x5" -> (2, 5)."""
    rows, columns = map(positive, text.split("x"))
    return rows, columns


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def check_names(paths: list[Path], suffix: str) -> None:
    """Whether each input has pictures of its own."""
    by_stem = {}
    for path in paths:
        other = by_stem.setdefault(path.stem, path)
        if other is not path:
            raise UserError(
                f"--input: {other} and {path} would both be drawn to {path.stem}_<block>.{suffix}"
            )


def check_points(points: list[tuple[float, float]], path: Path, image: np.ndarray) -> None:
    height, width = image.shape[:2]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"--query {x:g},{y:g} lies outside of {path}, which is {width} wide and {height} "
                "high"
            )


def detections(attention: Attention, threshold: float) -> list[int]:
    """Which detections, the most certain first."""
    if "instances" not in attention.predictions:
        raise UserError("--query-boxes: this model detects no boxes; give --query X,Y")
    scores = attention.predictions["instances"].scores
    order = scores.argsort(descending=True)
    return [i for i in order.tolist() if scores[i] >= threshold]


def draw(args: argparse.Namespace, path: Path, attention: Attention, metadata) -> None:
    """All pictures of one image."""
    columns, pictures, points = 1, [], args.query
    height, width = attention.image.shape[:2]
    if args.query_grid:
        rows, columns = args.query_grid
        points = [
            ((j + 0.5) * width / columns, (i + 0.5) * height / rows)
            for i in range(rows)
            for j in range(columns)
        ]
    if args.query_boxes:
        found = detections(attention, args.confidence_threshold)
        print(f"{path}: {len(found)} detections, {min(len(found), MAX_BOXES)} drawn")
        found = found[:MAX_BOXES]
        centres = attention.predictions["instances"].pred_boxes.get_centers()[found].tolist()
        points = [(min(x, width - 0.01), min(y, height - 0.01)) for x, y in centres]
        pictures = [draw_detection(attention, i, metadata) for i in found]
    for name in attention.names if points else []:
        with as_user_error(ValueError):  # weights that are not finite
            figure = draw_attention(
                attention, name, points, arrows=args.arrows, columns=columns, pictures=pictures
            )
        file = args.output / f"{path.stem}_{name}.{args.format}"
        figure.savefig(file, dpi=110)
        print(file)


def write_page(args: argparse.Namespace, attention: Attention, metadata) -> None:
    instances = attention.predictions.get("instances")
    if instances is not None:
        instances = instances[detections(attention, args.confidence_threshold)]
    names = metadata.get("thing_classes", ())
    with as_user_error(ValueError):  # weights that are not finite
        page = attention_page(attention, args.input[0].name, instances, names)
    args.html.write_text(page, "utf-8")
    print(args.html)


def main() -> None:
    args = parse_args()
    with exit_on_user_error():
        check_names(args.input, args.format)
        with as_user_error(InputError):
            images = {path: read(path, "BGR") for path in args.input}
        for path, image in images.items():
            check_points(args.query or [], path, image)
        cfg = load_config(find_config_file(args.config_file), args.opts)
        predictor = build_predictor(cfg)
        if not cfg.MODEL.WEIGHTS:
            print("note: MODEL.WEIGHTS is empty, so the weights are random", file=sys.stderr)
        with as_user_error(ValueError):
            blocks = AttentionRecorder(predictor.model, [args.block] if args.block else []).names
        metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "__unused")
        if args.html:
            write_page(args, attend(predictor, images[args.input[0]], blocks), metadata)
            return
        with as_user_error(OSError):
            args.output.mkdir(parents=True, exist_ok=True)
        for path, image in images.items():
            draw(args, path, attend(predictor, image, blocks), metadata)


if __name__ == "__main__":
    main()
