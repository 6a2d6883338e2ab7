#!/usr/bin/env python
"""Convert a released model of video-nonlocal-net (Caffe2, .pkl) for MODEL.WEIGHTS."""

import argparse

import torch
from nl_video.weights import convert_released

from nl_detectron.checkpoint.reading import LoadError, read_file
from nl_detectron.errors import exit_on_user_error
from nl_detectron.files import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", metavar="IN.pkl")
    parser.add_argument("new_path", metavar="OUT.pth")
    args = parser.parse_args()
    with exit_on_user_error():
        content = read_file(args.path)
        blobs = content.get("blobs", content) if isinstance(content, dict) else {}
        weights, left_out = convert_released(blobs)
        if "classifier.weight" not in weights:
            raise LoadError(f"{args.path} has no 'pred_w': it is not of video-nonlocal-net")
        with write_atomically(args.new_path, "wb") as file:
            torch.save({"model": weights, "__author__": "video-nonlocal-net"}, file)
        print(f"{args.new_path}: {len(weights)} tensors; left out: {', '.join(left_out) or 'none'}")


if __name__ == "__main__":
    main()
