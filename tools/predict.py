#!/usr/bin/env python3
"""Run a trained model on images, folders and videos, and draw its predictions.

With --coco-json, also write the detections as COCO results. The id of an image is that in
--annotations, or else the number in its name, such as 42 for 000042.jpg, or else its file name. The
id of a video frame is "<file name>/<frame number>".

Exit status: 0 on success, 1 if an input could not be read (the others are processed), and 2 for a
bad argument.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nl_detectron.data.annotations import read_annotations, read_for_evaluation
from nl_detectron.engine import build_predictor, check_nonlocal, find_config_file, load_config
from nl_detectron.engine.checks import CLASSIFIERS
from nl_detectron.errors import UserError, exit_on_user_error
from nl_detectron.files import write_atomically
from nl_detectron.visualization.predictions import THRESHOLDS, find_image_ids, find_inputs, predict

# isort: split
# After nl_detectron, which silences a warning of torch that importing detectron2 causes.
from detectron2.data import Metadata, MetadataCatalog


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
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


def read_names(annotations: str) -> tuple[Metadata, list[dict]]:
    """Return the class names and category ids of a COCO file, and its images."""
    data = read_annotations(annotations)
    if data["annotations"]:  # absent from files for testing only
        data = read_for_evaluation(annotations)
    categories = sorted(data["categories"], key=lambda category: category["id"])
    contiguous_ids = {category["id"]: i for i, category in enumerate(categories)}
    metadata = Metadata(thing_dataset_id_to_contiguous_id=contiguous_ids)
    metadata.thing_classes = [category["name"] for category in categories]
    return metadata, data["images"]


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
        dataset, images = args.annotations or (*cfg.DATASETS.TEST, "__unused")[0], []
        metadata = MetadataCatalog.get(dataset)
        if args.annotations:
            metadata, images = read_names(args.annotations)
        group, names = CLASSIFIERS.get(cfg.MODEL.META_ARCHITECTURE), metadata.get("thing_classes")
        if group and names and len(names) != cfg.MODEL[group].NUM_CLASSES:
            raise UserError(f"{dataset} has {len(names)} classes, unlike MODEL.{group}.NUM_CLASSES")
        image_ids = find_image_ids(images, outputs)
        predictor = build_predictor(cfg)
        args.output.mkdir(parents=True, exist_ok=True)
        results, failures = predict(outputs, predictor, metadata, image_ids)
        if args.coco_json:
            with write_atomically(args.coco_json, "w") as file:
                json.dump(results, file)
    print(f"{len(outputs) - failures} of {len(outputs)} files drawn, {len(results)} detections")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
