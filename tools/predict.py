#!/usr/bin/env python3
"""Run a trained model on images, folders and videos, and draw its predictions.

With --coco-json, also write the detections as COCO results. The image id is that in --annotations,
or else the file name, or its number as in COCO; for a video, it is "<file name>/<frame number>".

Exit status: 0; 1 if an input could not be read (the others are done); 2 for a bad argument.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog

from nl_detectron.data.coco_check import read_coco
from nl_detectron.engine import build_predictor, check_nonlocal, find_config_file, load_config
from nl_detectron.engine.checks import CLASSIFIERS
from nl_detectron.errors import UserError, exit_on_user_error
from nl_detectron.files import write_atomically
from nl_detectron.visualization.predictions import find_inputs, predict

THRESHOLDS = (
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.RETINANET.SCORE_THRESH_TEST",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="same as for train_net.py")
    add("--input", required=True, nargs="+", type=Path, metavar="PATH", help="files and folders")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for the drawings")
    add("--confidence-threshold", type=float, default=0.5, metavar="P", help="default: 0.5")
    add("--coco-json", type=Path, metavar="FILE", help="file for the COCO results")
    help = "COCO file with the names and ids of classes and images; default: DATASETS.TEST"
    add("--annotations", metavar="FILE", help=help)
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, such as MODEL.WEIGHTS FILE")
    return parser.parse_args(argv)


def read_names(annotations: str | None, cfg: CfgNode) -> tuple[Metadata, dict[str, int | str]]:
    """Return the metadata of the classes, and the image ids by file name."""
    if annotations is None:
        return MetadataCatalog.get(cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "__unused"), {}
    data = read_coco(annotations)
    categories = sorted(data["categories"], key=lambda category: category["id"])
    metadata = Metadata(
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories)},
    )
    return metadata, {Path(image["file_name"]).name: image["id"] for image in data["images"]}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    with exit_on_user_error():
        if args.coco_json and not args.coco_json.parent.is_dir():
            raise UserError(f"--coco-json: no folder {args.coco_json.parent}")
        outputs = find_inputs(args.input, args.output)
        thresholds = [part for key in THRESHOLDS for part in (key, args.confidence_threshold)]
        cfg = load_config(find_config_file(args.config_file), args.opts, overrides=thresholds)
        check_nonlocal(cfg)
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty; set it to the checkpoint of a trained model")
        metadata, image_ids = read_names(args.annotations, cfg)
        group, names = CLASSIFIERS.get(cfg.MODEL.META_ARCHITECTURE), metadata.get("thing_classes")
        if group and names and len(names) != cfg.MODEL[group].NUM_CLASSES:
            raise UserError(
                f"MODEL.{group}.NUM_CLASSES is {cfg.MODEL[group].NUM_CLASSES}, but there are "
                f"{len(names)} class names; give the training data's file as --annotations"
            )
        predictor = build_predictor(cfg)
        args.output.mkdir(parents=True, exist_ok=True)
        results, failures = predict(outputs, predictor, metadata, image_ids)
        if args.coco_json:
            with write_atomically(str(args.coco_json), "w") as file:
                json.dump(results, file)
    drawn = len(outputs) - len(failures)
    print(f"{drawn} of {len(outputs)} files drawn to {args.output}, {len(results)} detections")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
