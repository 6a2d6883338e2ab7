#!/usr/bin/env python3
"""Check the annotations and the images of a dataset in COCO's format, and repair annotations.

Exit status: 0 if detectron2 can train and evaluate on the dataset, 1 if there are errors, 2 if the
dataset is not found or is not in COCO's format. With --fix, this refers to the repaired copy.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Optional

from nl_detectron.data.annotations import decode, describe_types, normalise
from nl_detectron.data.coco import coco_files
from nl_detectron.data.coco_check import check_annotations, check_images, find_images
from nl_detectron.data.coco_fix import fix_annotations
from nl_detectron.errors import UserError, exit_on_user_error
from nl_detectron.files import write_atomically


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("name", nargs="?", help="name of a dataset registered with detectron2")
    add("--json", metavar="FILE", help="annotations, instead of a name")
    add("--images", metavar="DIR", help="folder of the images, instead of a name")
    add("--fix", metavar="OUT.json", help="write a repaired copy; --images is not needed")
    add("--no-crowd", action="store_true", help="with --fix: set iscrowd of all annotations to 0")
    args = parser.parse_args(argv)
    has_files = args.json is not None and (args.images is not None or args.fix is not None)
    if (args.name is None) != has_files or (args.name and (args.json or args.images)):
        parser.error("give either a name, or both --json FILE and --images DIR")
    if args.no_crowd and not args.fix:
        parser.error("--no-crowd needs --fix OUT.json")
    return args


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Print the problems and return the exit status."""
    args = parse_args(argv)
    with exit_on_user_error():
        json_file, folder = coco_files(args.name) if args.name else (args.json, args.images)
        data, _ = decode(json_file)
        if args.fix:
            _write_fixed(args, data, json_file, folder)
        normalise(data)
        errors, notes = list(describe_types(data)), []
        if not errors:
            problems = check_annotations(data)
            if folder is not None:
                problems.update(check_images(data, folder))
            for finding in problems.values():
                (errors if finding.is_error() else notes).append(str(finding))
    for kind, lines in (("error", errors), ("note", notes)):
        text = "".join(f"{kind}: {line}\n" for line in lines)
        print(text.encode(errors="backslashreplace").decode(), end="")  # surrogates in names
    counts = (f"{len(data[key]):,} {key}" for key in ("images", "annotations", "categories"))
    print(f"{args.fix or json_file}: {', '.join(counts)}")
    print(f"kinds of errors: {len(errors)}, kinds of notes: {len(notes)}")
    if errors and not args.fix:
        print("To write a copy with the repairs that are certain, add --fix OUT.json")
    return 1 if errors else 0


def _write_fixed(args: argparse.Namespace, data: dict, json_file: str, folder: str) -> None:
    if os.path.exists(args.fix) and os.path.samefile(args.fix, json_file):
        raise UserError(f"--fix {args.fix} would overwrite the annotations; give another file")
    changes = fix_annotations(data, no_crowd=args.no_crowd)
    if folder is not None and not list(describe_types(data)):
        changes["file names changed to those in the folder"] = find_images(data, folder)[1]
    with write_atomically(args.fix, "w") as file:
        json.dump(data, file)
    for change, count in (+changes).items():
        print(f"fixed: {count} {change}")
    print(f"{args.fix} written. Errors and notes that remain:")


if __name__ == "__main__":
    sys.exit(main())
