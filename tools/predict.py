#!/usr/bin/env python3
"""Run a trained model on images, folders and videos, and draw what it finds.

--coco-json writes the detections as COCO results, too. The image_id is the one that --annotations
has for the file name; otherwise the file name without its suffix if that is a number, as COCO's
are, and else the file name. Frames of a video have "<file name>/<number>", from 0.

Exit status: 0; 1 if some input could not be read, while the others were done; 2 if something given
is wrong.

examples:
  tools/predict.py --config-file configs/Synthetic/mask_rcnn_R_18_FPN_NL.yaml \\
      --input photo.jpg folder/ clip.mp4 --output drawn MODEL.WEIGHTS model_final.pth
"""

import argparse
import json
import sys
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog

from nl_detectron.data import read_coco
from nl_detectron.engine import load_config
from nl_detectron.engine.checks import CLASSIFIERS, check_nonlocal
from nl_detectron.engine.predictor import build_predictor
from nl_detectron.engine.setup import find_config_file
from nl_detectron.errors import UserError, as_user_error, exit_on_user_error
from nl_detectron.visualization.predictions import find_inputs, predict

THRESHOLDS = [
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.RETINANET.SCORE_THRESH_TEST",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="as of train_net.py")
    parser.add_argument(
        "--input", required=True, nargs="+", type=Path, metavar="PATH", help="files and folders"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="to draw to")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="the least score; for COCO's AP take the 0.05 of detectron2; default: %(default)s",
    )
    parser.add_argument("--coco-json", type=Path, metavar="FILE", help="to write")
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="COCO annotations, for the names and ids of classes and images; by default those of "
        "classes are of the first dataset in DATASETS.TEST",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, such as MODEL.WEIGHTS FILE"
    )
    return parser.parse_args()


def read_names(args: argparse.Namespace, cfg: CfgNode) -> tuple[Metadata, dict[str, int | str]]:
    """The names and ids of the classes, and the ids of images by their file names."""
    if args.annotations is None:
        source = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "__unused"
        metadata, image_ids = MetadataCatalog.get(source), {}
    else:
        with as_user_error(OSError), as_user_error(ValueError):
            data = read_coco(args.annotations)
        source = args.annotations
        categories = sorted(data["categories"], key=lambda category: category["id"])
        metadata = Metadata(
            thing_classes=[category["name"] for category in categories],
            thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories)},
        )
        image_ids = {Path(image["file_name"]).name: image["id"] for image in data["images"]}

    group = CLASSIFIERS.get(cfg.MODEL.META_ARCHITECTURE)
    names = metadata.get("thing_classes")
    if not names:
        print(f"note: {source} has no class names, so they are numbers", file=sys.stderr)
    elif group and cfg.MODEL[group].NUM_CLASSES != len(names):
        raise UserError(
            f"MODEL.{group}.NUM_CLASSES is {cfg.MODEL[group].NUM_CLASSES}, but {source} has "
            f"{len(names)} classes; --annotations takes those of the training data"
        )
    return metadata, image_ids


def main() -> int:
    """Predict, and return the exit status."""
    args = parse_args()
    with exit_on_user_error():
        if args.coco_json and not args.coco_json.parent.is_dir():
            raise UserError(f"--coco-json: no folder {args.coco_json.parent}")
        outputs = find_inputs(args.input, args.output)
        thresholds = [part for key in THRESHOLDS for part in (key, args.confidence_threshold)]
        cfg = load_config(find_config_file(args.config_file), args.opts, overrides=thresholds)
        check_nonlocal(cfg)
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty; set it to the checkpoint of a trained model")
        metadata, image_ids = read_names(args, cfg)
        predictor = build_predictor(cfg)
        args.output.mkdir(parents=True, exist_ok=True)
        results, failures = predict(outputs, predictor, metadata, image_ids)
    if args.coco_json:
        args.coco_json.write_text(json.dumps(results))
    drawn = len(outputs) - len(failures)
    print(f"{drawn} of {len(outputs)} files drawn to {args.output}, {len(results)} detections")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
