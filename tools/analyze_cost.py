#!/usr/bin/env python3
"""What a non-local block costs in each stage of a config's model.

examples:
  tools/analyze_cost.py --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_NL_1x.yaml
  tools/analyze_cost.py --config-file FILE --size 800x1344 --size 480x640 --output output/cost \\
      MODEL.NONLOCAL.INSTANTIATION dot_product

FILE is a path, or the name of a config that comes with nl_detectron. Parameters and multiply-adds
(GMAC) of one block are given for each stage, size of image and sub-sampling, with their share of
the model without blocks, whose heads are counted for 1000 proposals and 100 detections. Nothing is
run, so any size is fine.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

from nl_detectron.analysis import analyze_cost
from nl_detectron.analysis.cost_report import markdown, write
from nl_detectron.engine import load_config
from nl_detectron.engine.checks import check_nonlocal
from nl_detectron.engine.setup import find_config_file
from nl_detectron.errors import as_user_error, exit_on_user_error
from nl_detectron.modeling.insertion import REPORT_SIZE


def size(text: str) -> tuple[int, int]:
    """
    Raises:
        argparse.ArgumentTypeError: it is not HEIGHTxWIDTH.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 800x1344")
    return int(match[1]), int(match[2])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--size",
        type=size,
        action="append",
        metavar="HxW",
        help="of the image in pixels; again for more (default: {}x{})".format(*REPORT_SIZE),
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="also write cost.md, .csv, .json and .png"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE, over the config's")
    args = parser.parse_args()

    with exit_on_user_error():
        cfg = load_config(find_config_file(args.config_file), args.opts)
        check_nonlocal(cfg)
        with as_user_error(ValueError, about="MODEL."):
            models, blocks = analyze_cost(cfg, args.size or [REPORT_SIZE])
    command = shlex.join(["tools/analyze_cost.py", *sys.argv[1:]])
    tables = f"Written by `{command}`.\n\n{markdown(models, blocks)}"
    print(tables)
    if args.output:
        for path in write(models, blocks, tables, args.output):
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
