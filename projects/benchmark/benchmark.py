#!/usr/bin/env python3
"""Measure time and memory of the non-local operation, the block and Mask R-CNN: see README.md."""

import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from nl_benchmark.competitors import detectors, implementations
from nl_benchmark.correctness import errors_and_losses
from nl_benchmark.measurement import circumstances, measure, save, table, write_tables
from tqdm import tqdm

from nl_detectron.errors import UserError, exit_on_user_error
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES

PROJECT = Path(__file__).resolve().parent
STAGES = [(1024, 50, 84), (512, 100, 168)]  # res4 and res3 of an 800 x 1344 image


def argument_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, epilog="--size and --locations can be repeated.")
    parser.add_argument("bench", choices=["op", "block", "model", "correctness", "report"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--size", nargs=3, type=int, action="append", metavar=tuple("CHW"))
    parser.add_argument("--functions", nargs="+", choices=INSTANTIATIONS, default=INSTANTIATIONS)
    parser.add_argument("--subsamples", nargs="+", choices=SUBSAMPLES, default=SUBSAMPLES)
    parser.add_argument("--backbone", choices=["R_50", "R_101", "X_152_32x8d"], default="R_50")
    parser.add_argument("--locations", nargs="+", action="append", help="of the model's blocks")
    parser.add_argument("--image-size", type=int, nargs=2, default=[800, 1344])
    return parser


def comparisons(args: Namespace) -> Iterator[tuple[dict, Callable]]:
    """Yield the facts for the table, and a function that returns the competitors."""
    factory_kwargs = {"dtype": getattr(torch, args.dtype), "device": args.device}
    if args.bench == "model":
        shape = (args.batch, *args.image_size)
        facts = {"backbone": args.backbone, "images": " x ".join(map(str, shape))}
        added = list(product(args.subsamples, args.locations or [["res4.-2"]]))
        yield facts, partial(detectors, args.backbone, shape, factory_kwargs, added)
        return
    for size, subsample, function in product(args.size or STAGES, args.subsamples, args.functions):
        shape = (args.batch, *size)
        facts = {"function": function, "B x C x H x W": " x ".join(map(str, shape))}
        facts["sub-sampling"] = subsample
        options = {"instantiation": function, "subsample": subsample}
        build = partial(implementations, args.bench, shape, factory_kwargs, **options)
        if args.bench == "op":
            yield facts, build
            continue
        for norm in ["", "BN"] if function == "embedded_gaussian" else [""]:
            yield {**facts, "norm": norm}, partial(build, norm=norm)


def measured_rows(args: Namespace) -> Iterator[dict]:
    for facts, build in tqdm(list(comparisons(args))):
        for row in measure(build(), args.rounds, args.device):
            yield {"facts": facts, **row}


def main(arguments: list[str]) -> None:
    args = argument_parser().parse_args(arguments)
    if args.bench == "report":
        return write_tables(PROJECT / "README.md", PROJECT / "results")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU")
    # In float32, no TensorFloat-32, which torch would use for convolutions and not for products.
    torch.backends.cudnn.allow_tf32 = False
    command = shlex.join(["projects/benchmark/benchmark.py", *arguments])
    results = circumstances(command, args.device) | {"dtype": args.dtype, "rows": []}
    for row in errors_and_losses(args) if args.bench == "correctness" else measured_rows(args):
        results["rows"].append(row)
        if args.output:
            save(results, args.output)
    print(table(results["rows"]))


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
