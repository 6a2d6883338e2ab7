#!/usr/bin/env python3
"""Measure time and memory of the non-local operation, the block and whole models.

op:     the operation alone, each exact form against its N x M matrix
block:  the block against mmcv's NonLocal2d, timm's NonLocalAttn and the matrix form
model:  Mask R-CNN, baseline against blocks and ways of sub-sampling, training and inference
report: docs/PERFORMANCE.md from what the others wrote

examples:
  tools/benchmark.py op --output docs/performance/op_cpu
  tools/benchmark.py block --sizes 1024x18x30 1024x26x40 1024x36x58 --device cuda --dtype float16
  tools/benchmark.py model --models R_50 --blocks 1 --subsamples pool_conv --batch 2
  tools/benchmark.py report docs/performance > docs/PERFORMANCE.md

"op", "block" and "model" need pip install -e .[bench].
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch
from nl_detectron.analysis.benchmark.block import block_cases
from nl_detectron.analysis.benchmark.model import PLACES, model_cases, model_config
from nl_detectron.analysis.benchmark.operation import operation_cases
from nl_detectron.analysis.benchmark.page import performance_page
from nl_detectron.analysis.benchmark.run import run
from nl_detectron.analysis.benchmark.sizes import SMALL, parse_size

from nl_detectron.engine import UserError, exit_on_user_error
from nl_detectron.layers import SUBSAMPLES


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    benches = main.add_subparsers(dest="bench", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    common.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    common.add_argument("--batch", type=positive, default=1)
    common.add_argument("--rounds", type=positive, default=15, help="default: %(default)s")
    common.add_argument(
        "--output", type=Path, metavar="PATH", help="write PATH.md, .csv, .json, and perhaps .png"
    )
    for name in ("op", "block"):
        bench = benches.add_parser(name, parents=[common])
        bench.add_argument(
            "--sizes",
            nargs="+",
            default=["res4", "res3"],
            metavar="SIZE",
            help="res4 or res3 of an 800x1344 image, or CxHxW; a plot is drawn of 3 or more "
            "that have the same C (default: res4 res3)",
        )
    bench.add_argument("--subsample", choices=SUBSAMPLES, default="none", help="default: none")
    bench = benches.add_parser("model", parents=[common])
    bench.add_argument("--models", nargs="+", choices=PLACES, default=list(PLACES))
    bench.add_argument("--blocks", nargs="+", type=int, choices=[1, 5, 10], default=[1, 5, 10])
    bench.add_argument(
        "--subsamples", nargs="+", choices=SUBSAMPLES, default=["pool_conv", "conv_pool", "none"]
    )
    bench.add_argument(
        "--image-size", nargs=2, type=positive, default=[800, 1344], metavar=("HEIGHT", "WIDTH")
    )
    report = benches.add_parser("report")
    report.add_argument("folder", type=Path, help="that the others wrote into")
    return main


def positive(text: str) -> int:
    """
    Raises:
        argparse.ArgumentTypeError: it is not a whole number of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def comparisons(args: argparse.Namespace) -> tuple[list, list]:
    """What is to be timed, and the same in float64 and small, to be compared before."""
    dtype = getattr(torch, args.dtype)
    if args.bench == "model":
        height, width = args.image_size
        todo = [
            model_cases(
                model,
                model_config(model, args.device),
                dtype,
                blocks=args.blocks,
                subsamples=args.subsamples,
                batch=args.batch,
                height=height,
                width=width,
            )
            for model in args.models
        ]
        return todo, []  # a new block is the identity: the timed outputs are equal
    sizes = [parse_size(text, args.batch) for text in args.sizes]
    options = {"subsample": args.subsample} if args.bench == "block" else {}
    cases = {"op": operation_cases, "block": block_cases}[args.bench]
    todo = [of for size in sizes for of in cases(size, dtype, args.device, **options)]
    return todo, cases(SMALL, torch.float64, "cpu", **options)


def main() -> None:
    args = parser().parse_args()
    command = shlex.join(["tools/benchmark.py", *sys.argv[1:]])
    with exit_on_user_error():
        try:
            if args.bench == "report":
                print(performance_page(args.folder, f"{command} > docs/PERFORMANCE.md"), end="")
                return
            if args.device == "cuda" and not torch.cuda.is_available():
                raise ValueError("--device cuda: torch finds no GPU here")
            todo, small = comparisons(args)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from error
        run(
            args.bench,
            todo,
            small,
            command=command,
            device=args.device,
            dtype=args.dtype,
            rounds=args.rounds,
            output=args.output,
        )


if __name__ == "__main__":
    main()
