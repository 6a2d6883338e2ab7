#!/usr/bin/env python3
"""Compare the detections of two runs, A and B, on the same images.

Prints AP, AP50, AP75, APs, APm and APl of both in percent, the difference B - A, and its 95%
confidence interval by a paired bootstrap over the images. The interval covers the choice of test
images. It does not cover the variation between training seeds, which needs more runs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from nl_detectron.errors import exit_on_user_error
from nl_detectron.evaluation.coco_results import JUDGED, read_results, scoring_options
from nl_detectron.evaluation.comparison import compare, difference_table

MIN_RESAMPLES = 100  # with fewer, the ends of the interval depend on two or three resamples


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    help = "COCO results, such as OUTPUT_DIR/inference/coco_instances_results.json"
    parser.add_argument("a", type=Path, metavar="A.json", help=help)
    parser.add_argument("b", type=Path, metavar="B.json", help=help)
    parser.add_argument("--annotations", type=Path, required=True, metavar="GT.json")
    help = "default: those for which both files have detections"
    parser.add_argument("--tasks", nargs="+", choices=JUDGED, help=help)
    help = "bootstrap resamples (default: %(default)s)"
    parser.add_argument("--resamples", type=int, default=1000, help=help)
    help = "seed of the bootstrap (default: %(default)s)"
    parser.add_argument("--seed", type=int, default=0, help=help)
    help = "OKS sigmas (default: TEST.KEYPOINT_OKS_SIGMAS in config.yaml of the runs, or COCO's)"
    parser.add_argument("--keypoint-sigmas", nargs="+", type=float, metavar="S", help=help)
    help = "limit of detections (default: TEST.DETECTIONS_PER_IMAGE in config.yaml, at least 100)"
    parser.add_argument("--max-dets-per-image", type=int, metavar="N", help=help)
    args = parser.parse_args(arguments)
    if args.resamples < MIN_RESAMPLES or args.seed < 0:
        parser.error(f"--resamples must be at least {MIN_RESAMPLES}, and --seed at least 0")

    with exit_on_user_error():
        annotations, (a, b), tasks = read_results(args.annotations, [args.a, args.b], args.tasks)
        if a == b:
            print(f"warning: {args.a} and {args.b} have the same detections", file=sys.stderr)
        limits = args.keypoint_sigmas, args.max_dets_per_image
        options = scoring_options(annotations, [args.a, args.b], tasks, *limits)
        options |= {"resamples": args.resamples, "seed": args.seed}
        differences = {task: compare(annotations, a, b, task, **options) for task in tasks}
    print(f"A: {args.a}\nB: {args.b}\n\n{difference_table(differences)}\n")
    print(f"{len(annotations.imgs)} images, {args.resamples} resamples, seed {args.seed}")


if __name__ == "__main__":
    main()
