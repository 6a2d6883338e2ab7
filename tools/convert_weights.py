#!/usr/bin/env python3
"""Convert the weights of another implementation's ResNet with non-local blocks.

OUT is for MODEL.WEIGHTS. What no name in detectron2 is known for, such as heads, is left out and
listed. With which MODEL.NONLOCAL keys the blocks compute the same stands in
nl_detectron/checkpoint/conversion.py.
"""

import argparse

from nl_detectron.checkpoint import SOURCES, LoadError, SaveError, convert_file
from nl_detectron.errors import as_user_error, exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", metavar="IN", help="a .pth or .pkl file")
    parser.add_argument("new_path", metavar="OUT", help="a .pth file")
    parser.add_argument(
        "--from",
        dest="source",
        choices=SOURCES,
        required=True,
        help="mmdet: mmdet, mmaction2, torchvision; caffe2: video-nonlocal-net",
    )
    args = parser.parse_args()
    with exit_on_user_error(), as_user_error(LoadError), as_user_error(SaveError):
        print(convert_file(args.path, args.new_path, args.source))


if __name__ == "__main__":
    main()
