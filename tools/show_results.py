#!/usr/bin/env python3
"""Show what two runs, A and B, make of the same images, beside the ground truth.

Images stand in the order of how much A and B differ, in whichever direction. The score of an image
is F1, 2 hits / (detections + objects), the mean over the IoU thresholds 0.50, 0.55, ..., 0.95. Only
detections from --confidence-threshold on count and are drawn.

Written to the output folder are a PNG for each image, numbered in that order, and index.html, which
has all of them inside.

examples:
  tools/show_results.py output/demo/Synthetic/mask_rcnn_R_18_FPN{,_NL}/seed1 \\
      --dataset nl_synthetic_val
  tools/show_results.py A.json B.json --annotations val.json --images val/
"""

import argparse
from pathlib import Path

from detectron2.data import MetadataCatalog

from nl_detectron.data.coco import coco_files
from nl_detectron.errors import UserError, as_user_error, exit_on_user_error
from nl_detectron.evaluation.coco_results import read_results
from nl_detectron.visualization.names import run_names
from nl_detectron.visualization.results import Painter, rank, show, summary

RESULTS = Path("inference", "coco_instances_results.json")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for run in "ab":
        help = f"the output folder of a run, or COCO results such as its {RESULTS}"
        parser.add_argument(run, type=Path, metavar=run.upper(), help=help)
    truth = parser.add_mutually_exclusive_group(required=True)
    truth.add_argument("--dataset", metavar="NAME", help="registered in detectron2, such as A's")
    truth.add_argument("--annotations", type=Path, metavar="FILE", help="COCO annotations")
    parser.add_argument("--images", type=Path, metavar="DIR", help="of --annotations")
    parser.add_argument(
        "--count", type=int, default=20, metavar="N", help="of images (default: %(default)s)"
    )
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, metavar="P", help="default: %(default)s"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/results"), metavar="DIR", help="to write to"
    )
    args = parser.parse_args()
    if (args.annotations is None) != (args.images is None):
        parser.error("--annotations and --images go together")
    if args.count < 1:
        parser.error(f"--count {args.count}: takes 1 or more")
    return args


def main() -> None:
    args = parse_args()
    with exit_on_user_error(), as_user_error(OSError), as_user_error(ValueError):
        metadata = MetadataCatalog.get(args.dataset) if args.dataset else None
        files = coco_files(args.dataset) if args.dataset else (args.annotations, args.images)
        if not Path(files[1]).is_dir():
            raise UserError(f"--images: no folder {files[1]}")
        paths = [path / RESULTS if path.is_dir() else path for path in (args.a, args.b)]
        annotations, runs, (task, *_) = read_results(files[0], paths)
        for path, run in zip(paths, runs):
            run[:] = [found for found in run if found["score"] >= args.confidence_threshold]
            if not run:
                raise UserError(
                    f"{path}: no score is {args.confidence_threshold:g} or more; give a lower "
                    "--confidence-threshold"
                )
        names = run_names([args.a, args.b])
        pairs = rank(annotations, *runs, task)
        painter = Painter(annotations, Path(files[1]), metadata)
        show(pairs, args.count, dict(zip(names, runs)), painter, args.output)
    print(f"{summary(pairs, names)}\nwritten to {args.output}")


if __name__ == "__main__":
    main()
