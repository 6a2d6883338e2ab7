#!/usr/bin/env python3
"""Compare the detections of two runs, A and B, on the same images.

Prints AP, AP50, AP75, APs, APm and APl of both in percent, the difference B - A, and its 95%
confidence interval by a paired bootstrap over the images. The interval tells what other images
would do to the difference. It knows nothing of other seeds in training: for that, train again.
"""

import argparse
from pathlib import Path

from nl_detectron.errors import UserError, exit_on_user_error
from nl_detectron.evaluation.coco_results import JUDGED, read_results
from nl_detectron.evaluation.comparison import MIN_RESAMPLES, compare, difference_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for run in "ab":
        help = "COCO results, such as OUTPUT_DIR/inference/coco_instances_results.json"
        parser.add_argument(run, type=Path, metavar=f"{run.upper()}.json", help=help)
    parser.add_argument(
        "--annotations", type=Path, required=True, metavar="GT.json", help="COCO annotations"
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=JUDGED, help="by default those that both files have"
    )
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    args = parser.parse_args()
    if args.resamples < MIN_RESAMPLES:
        parser.error(f"--resamples {args.resamples}: {MIN_RESAMPLES} are the least")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: takes 0 or more")

    with exit_on_user_error():
        try:
            annotations, (a, b), tasks = read_results(
                args.annotations, [args.a, args.b], args.tasks
            )
        except (FileNotFoundError, ValueError) as error:
            raise UserError(error) from error
    differences = {
        task: compare(annotations, a, b, task, resamples=args.resamples, seed=args.seed)
        for task in tasks
    }
    print(f"A: {args.a}\nB: {args.b}\n\n{difference_table(differences)}\n")
    print(f"{len(annotations.imgs)} images, {args.resamples} resamples, seed {args.seed}")


if __name__ == "__main__":
    main()
