#!/usr/bin/env python3
"""Measure time and memory of the non-local operation, the block and Mask R-CNN.

op:          each pairwise function against its N x M matrix; on a GPU, against torch's attention
block:       our block against itself with the matrix, mmcv's NonLocal2d and timm's NonLocalAttn
model:       Mask R-CNN with non-local blocks against the same without
correctness: errors of the block in every type and mode, and losses in mixed precision
report:      write the tables of all results into README.md
--size (res4 and res3 of an 800 x 1344 image by default) and --locations can be repeated.
"""

import shlex
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from nl_benchmark.competitors import blocks, detectors, operations
from nl_benchmark.correctness import block_errors, training_losses
from nl_benchmark.report import circumstances, save, table, write_tables
from nl_benchmark.timing import measure
from tqdm import tqdm

from nl_detectron.errors import exit_on_user_error
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES

PROJECT = Path(__file__).resolve().parent
STAGES = [(1024, 50, 84), (512, 100, 168)]


def argument_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    benches = parser.add_subparsers(dest="bench", required=True)
    report = benches.add_parser("report")
    report.add_argument("--readme", type=Path, default=PROJECT / "README.md")
    for name in ("op", "block", "correctness", "model"):
        bench = benches.add_parser(name)
        bench.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        bench.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
        bench.add_argument("--batch", type=int, default=1)
        bench.add_argument("--rounds", type=int, default=15)
        bench.add_argument("--output", type=Path, help="JSON file to write")
        if name != "model":
            bench.add_argument("--size", nargs=3, type=int, action="append", metavar=tuple("CHW"))
        bench.add_argument("--subsamples", nargs="+", choices=SUBSAMPLES, default=SUBSAMPLES)
    bench.add_argument("--backbone", choices=["R_50", "R_101", "X_152_32x8d"], default="R_50")
    bench.add_argument("--locations", nargs="+", action="append", required=True)
    bench.add_argument("--image-size", type=int, nargs=2, default=[800, 1344])
    return parser


def measurements(args: Namespace) -> Iterator[dict]:
    """Yield the rows of a table."""
    if args.bench == "correctness":
        (size,) = args.size or STAGES[:1]
        yield from block_errors((2, *size), args.device)
        image_size, steps = ([64, 96], 1) if args.size else ([800, 1344], 20)
        yield from training_losses(image_size, steps, args.device)
        return
    for facts, competitors in tqdm(comparisons(args, getattr(torch, args.dtype), args.device)):
        for row in measure(competitors, args.rounds, args.device):
            yield {"facts": facts, **row}


def comparisons(args: Namespace, dtype: torch.dtype, device: str) -> Iterator:
    """Yield (facts for the table, competitors)."""
    if args.bench == "model":
        shape = (args.batch, *args.image_size)
        facts = {"backbone": args.backbone, "images": " x ".join(map(str, shape))}
        yield facts, detectors(args.backbone, args.locations, args.subsamples, shape, dtype, device)
        return
    for size, subsample, function in product(args.size or STAGES, args.subsamples, INSTANTIATIONS):
        shape = (args.batch, *size)
        facts = {"function": function, "B x C x H x W": " x ".join(map(str, shape))}
        facts["sub-sampling"] = subsample
        if args.bench == "op":
            yield facts, operations(function, subsample, shape, dtype, device)
            continue
        for norm in ["", "BN"] if function == "embedded_gaussian" else [""]:
            competitors = blocks(function, norm, subsample, shape, dtype, device)
            yield {**facts, "norm": norm}, competitors


def main(arguments: list[str]) -> None:
    args = argument_parser().parse_args(arguments)
    if args.bench == "report":
        write_tables(args.readme, PROJECT / "results")
        return
    command = shlex.join(["projects/benchmark/benchmark.py", *arguments])
    results = circumstances(command, args.device) | {"dtype": args.dtype, "rows": []}
    for row in measurements(args):
        results["rows"].append(row)
        if args.output:
            save(results, args.output)
    print(table(results["rows"]))


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
