#!/usr/bin/env python3
"""Show the detections of two runs, A and B, on the same images, beside the ground truth.

Images are ordered by how much the F1 of A and B differs. Only detections above the confidence
threshold are counted and drawn. The output folder gets a PNG per image and index.html.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nl_detectron.data.coco import coco_files
from nl_detectron.data.coco_check import find_images
from nl_detectron.errors import UserError, exit_on_user_error
from nl_detectron.evaluation.coco_results import JUDGED, read_results, scoring_options
from nl_detectron.visualization.curves import run_names
from nl_detectron.visualization.results import write_results

# isort: split
# After nl_detectron, which silences a warning of torch that importing detectron2 causes.
from detectron2.data import Metadata, MetadataCatalog

RESULTS = "coco_instances_results.json"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs=2, type=Path, metavar="RUN", help="output folder or COCO results of A, B")
    add("--dataset", metavar="NAME", help="name of the dataset, such as nl_synthetic_val")
    add("--annotations", type=Path, metavar="FILE", help="COCO annotations, instead of --dataset")
    add("--images", type=Path, metavar="DIR", help="folder of the images of --annotations")
    add("--count", type=int, default=20, metavar="N", help="number of images (default: 20)")
    add("--confidence-threshold", type=float, default=0.5, metavar="P", help="default: 0.5")
    add("--tasks", nargs=1, choices=JUDGED, metavar="TASK", help="what is scored; default: bbox")
    help = "OKS sigmas (default: TEST.KEYPOINT_OKS_SIGMAS in config.yaml of the runs, or COCO's)"
    add("--keypoint-sigmas", nargs="+", type=float, metavar="S", help=help)
    help = "limit of detections (default: TEST.DETECTIONS_PER_IMAGE in config.yaml, at least 100)"
    add("--max-dets-per-image", type=int, metavar="N", help=help)
    add("--output", type=Path, default=Path("output/results"), metavar="DIR")
    args = parser.parse_args(argv)
    if bool(args.dataset) == bool(args.annotations) or bool(args.images) != bool(args.annotations):
        parser.error("give either --dataset, or --annotations and --images")
    if args.runs[0].resolve() == args.runs[1].resolve():
        parser.error("A and B are the same run")
    return args


def results_file(run: Path, dataset: str | None) -> Path:
    """Return the COCO results file of a run; with several datasets, each has a subfolder."""
    if not run.is_dir():
        return run
    of_dataset = run / "inference" / (dataset or "") / RESULTS
    return of_dataset if of_dataset.is_file() else run / "inference" / RESULTS


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_user_error():
        files = coco_files(args.dataset) if args.dataset else (args.annotations, args.images)
        metadata = MetadataCatalog.get(args.dataset) if args.dataset else Metadata()
        paths = [results_file(path, args.dataset) for path in args.runs]
        annotations, runs, (task, *_) = read_results(files[0], paths, args.tasks)
        find_images(annotations.dataset, files[1])  # replaces names that have another Unicode form
        if runs[0] == runs[1]:
            print(f"warning: {paths[0]} and {paths[1]} have the same detections", file=sys.stderr)
        sigmas, limit = args.keypoint_sigmas, args.max_dets_per_image
        scoring = scoring_options(annotations, paths, [task], sigmas, limit)
        for path, run in zip(paths, runs):
            run[:] = [found for found in run if found["score"] >= args.confidence_threshold]
            if not run:
                raise UserError(f"{path}: no score reaches --confidence-threshold")
        runs = dict(zip(run_names(args.runs), runs))
        options = {"metadata": metadata, "count": args.count, "task": task, **scoring}
        print(write_results(annotations, Path(files[1]), runs, args.output, **options))
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
