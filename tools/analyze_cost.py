#!/usr/bin/env python3
"""Print the cost of a non-local block in each stage of a config's model.

examples:
  tools/analyze_cost.py --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_NL_1x.yaml
  tools/analyze_cost.py --config-file FILE --size 800x1344 --size 480x640 \\
      MODEL.NONLOCAL.INSTANTIATION dot_product

FILE is a path, or the name of a config of nl_detectron. The first table gives parameters and
multiply-adds (GMAC) of the model without blocks and with those of the config, for 1000 proposals
and 100 detections. The second table gives the same for one block in each stage, for each kind of
sub-sampling, and the size that its affinity matrix would have in float32 (it is never built). The
model is not run, so any image size is fine.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Optional

from tabulate import tabulate

from nl_detectron.analysis import analyze_cost
from nl_detectron.engine import check_nonlocal, find_config_file, load_config
from nl_detectron.errors import exit_on_user_error
from nl_detectron.modeling.insertion import REPORT_SIZE


def size(text: str) -> tuple[int, int]:
    """Convert HEIGHTxWIDTH to two ints."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 800x1344")
    return int(match[1]), int(match[2])


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    help = "size of the image in pixels; can be repeated (default: {}x{})".format(*REPORT_SIZE)
    parser.add_argument("--size", type=size, action="append", metavar="HxW", help=help)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    args = parser.parse_args(arguments)

    with exit_on_user_error():
        cfg = load_config(find_config_file(args.config_file), args.opts)
        check_nonlocal(cfg)
        tables = analyze_cost(cfg, args.size or [REPORT_SIZE])
    for rows in tables:
        print(tabulate(rows, "keys", tablefmt="github", intfmt=",", floatfmt=",.2f"), end="\n\n")


if __name__ == "__main__":
    main()
