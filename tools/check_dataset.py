#!/usr/bin/env python3
"""Check the annotations and the images of a dataset in COCO's format.

Exit status: 0 if detectron2 can train and evaluate on the dataset, 1 if there are errors, 2 if the
dataset is not found or is not in COCO's format.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Optional

from nl_detectron.data.coco import coco_files
from nl_detectron.data.coco_check import (
    Problem,
    check_annotations,
    check_images,
    describe,
    read_coco,
)
from nl_detectron.errors import exit_on_user_error


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the problems and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="name of a dataset registered with detectron2")
    parser.add_argument("--json", metavar="FILE", help="instead of a name: the annotations")
    parser.add_argument("--images", metavar="DIR", help="instead of a name: folder of the images")
    args = parser.parse_args(argv)
    if (args.json is None) != (args.images is None) or (args.name is None) == (args.json is None):
        parser.error("give either a name, or both --json FILE and --images DIR")

    with exit_on_user_error():
        json_file, folder = coco_files(args.name) if args.name else (args.json, args.images)
        data = read_coco(json_file)
        problems = check_annotations(data)
        if Problem.INCOMPLETE not in problems:
            problems.update(check_images(data, folder))

    errors = [problem for problem in problems if problem.is_error]
    notes = [problem for problem in problems if not problem.is_error]
    for problem in [*errors, *notes]:
        print(f"{'error' if problem.is_error else 'note'}: {describe(problem, problems[problem])}")
    counts = (f"{len(data[key]):,} {key}" for key in ("images", "annotations", "categories"))
    print(f"{json_file}: {', '.join(counts)}")
    print(f"kinds of errors: {len(errors)}, kinds of notes: {len(notes)}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
