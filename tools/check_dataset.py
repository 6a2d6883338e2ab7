#!/usr/bin/env python3
"""Check a dataset in COCO's format: the annotations, and every image.

Exit status: 0 if training and evaluation would be right, though there may be notes; 1 if one of
them would fail or be wrong; 2 if the dataset cannot be found or is not in COCO's format.
"""

import argparse
import sys

from nl_detectron.data import check_annotations, check_images, describe, read_coco
from nl_detectron.data.coco import coco_files
from nl_detectron.data.coco_check import Problem
from nl_detectron.errors import UserError, exit_on_user_error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="of a dataset registered with detectron2")
    parser.add_argument("--json", metavar="FILE", help="in place of a name: the annotations")
    parser.add_argument("--images", metavar="DIR", help="and the folder of their images")
    args = parser.parse_args()
    if (args.json is None) != (args.images is None) or (args.name is None) == (args.json is None):
        parser.error("give either a name, or both --json FILE and --images DIR")
    return args


def main() -> int:
    """Print what is wrong, and return the exit status."""
    args = parse_args()
    with exit_on_user_error():
        json_file, folder = coco_files(args.name) if args.name else (args.json, args.images)
        try:
            data = read_coco(json_file)
            problems = check_annotations(data)
            if Problem.INCOMPLETE not in problems:
                problems.update(check_images(data, folder))
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from error

    errors = [problem for problem in problems if problem.is_error]
    notes = [problem for problem in problems if not problem.is_error]
    for severity, kinds in {"error": errors, "note": notes}.items():
        for problem in kinds:
            print(f"{severity}: {describe(problem, problems[problem])}")
    counts = (f"{len(data[key]):,} {key}" for key in ("images", "annotations", "categories"))
    print(f"{json_file}: {', '.join(counts)}")
    print(f"kinds of errors: {len(errors)}, kinds of notes: {len(notes)}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
