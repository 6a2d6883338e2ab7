#!/usr/bin/env python3
"""Export a model or its backbone, and compare the file with the model.

For each size, the script prints the largest error of an output, relative to the largest value of
the output. The exit status is 0 if all errors are at most 1e-4, 1 if not, and 2 if the input is
wrong or this export is not possible with the installed torch and detectron2.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from nl_detectron.checkpoint import AuditedCheckpointer
from nl_detectron.engine import find_config_file, load_config
from nl_detectron.errors import exit_on_user_error
from nl_detectron.export import FORMATS, export_model, relative_error
from nl_detectron.modeling import build_model

TOLERANCE = 1e-4


def parse_sizes(text: str) -> list[list[int]]:
    """Parse "64x96,81x113" to [[64, 96], [81, 113]]."""
    sizes = [[int(side) for side in size.split("x")] for size in text.split(",")]
    if not all(len(size) == 2 and min(size) > 0 for size in sizes):
        raise ValueError(text)
    return sizes


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="as for train_net.py")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument(
        "--part",
        choices=["backbone", "model"],
        default="backbone",
        help="a whole model can be exported to torchscript-trace only; default: backbone",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--sizes",
        type=parse_sizes,
        default="256x320,192x416",
        metavar="HxW,HxW,...",
        help="image sizes: export with the first, compare at all; default: %(default)s",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, such as MODEL.WEIGHTS FILE"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status."""
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.part == "model" and args.format != "torchscript-trace":
        parser.error(f"--part model can only be exported to torchscript-trace, not {args.format}")
    torch.manual_seed(0)
    with exit_on_user_error():
        cfg = load_config(find_config_file(args.config_file), args.opts)
        model = build_model(cfg).eval()
        AuditedCheckpointer(model, partial=cfg.MODEL.WEIGHTS_PARTIAL).load(cfg.MODEL.WEIGHTS)
        if args.part == "model":
            images = [torch.rand(3, *size) * 255 for size in args.sizes]
        else:
            model, device = model.backbone, model.device
            images = [torch.randn(2, 3, *size, device=device) for size in args.sizes]
        export_model(model, images[0], args.format, args.output)
        worst = 0.0
        for (height, width), image in zip(args.sizes, images):
            error = relative_error(model, image, args.format, args.output)
            print(f"{height}x{width}: relative error {error:.1e}")
            worst = max(worst, error)
    verdict = "matches" if worst <= TOLERANCE else "DOES NOT MATCH"
    print(f"{args.output}: {args.format}, {verdict} the model, torch {torch.__version__}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
