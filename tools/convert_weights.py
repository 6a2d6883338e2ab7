#!/usr/bin/env python3
"""Convert a ResNet with or without non-local blocks from another library for MODEL.WEIGHTS.

nl_detectron/checkpoint/conversion.py lists the MODEL.NONLOCAL keys with which the blocks compute
the same function. Tensors outside the backbone are left out and listed.
"""

import argparse

from nl_detectron.checkpoint.conversion import SOURCES, convert_file
from nl_detectron.errors import exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", metavar="IN", help="a .pth or .pkl file")
    parser.add_argument("new_path", metavar="OUT", help="a .pth file")
    parser.add_argument(
        "--from",
        dest="source",
        choices=SOURCES,
        required=True,
        help="mmdet: mmdet, mmseg, mmaction2, torchvision; caffe2: video-nonlocal-net",
    )
    args = parser.parse_args()
    with exit_on_user_error():
        print(convert_file(args.path, args.new_path, args.source))


if __name__ == "__main__":
    main()
