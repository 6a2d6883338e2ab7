#!/usr/bin/env python3
"""Check and measure what needs a GPU by commands of benchmark.py, most important first.

Each command runs in a process of its own, since after an error in a GPU kernel all later calls of a
process fail, and writes a file, row by row.
"""

import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from itertools import product
from pathlib import Path

BENCHMARK = Path(__file__).resolve().with_name("benchmark.py")
LOCATIONS = {  # one, five and ten blocks; the paper gives the last two for R_50
    "R_50": "res4.-2 --locations res3.1::2 res4.1::2 --locations res3.* res4.*",
    "R_101": "res4.-2 --locations res3.1::2 res4.6::7 --locations res3.* res4.2::4",
    "X_152_32x8d": "res4.-2 --locations res3.1::4 res4.6::11 --locations res3.1::2 res4.5::6",
}
MODEL = "model --batch {} --backbone {} --subsamples pool_conv --dtype {} --locations {}"
COMMANDS = {
    "correctness": ["correctness"],
    "kernels": [f"op --subsamples pool_conv none --dtype {t}" for t in ("bfloat16", "float32")],
    "models": [
        MODEL.format(batch, name, "float16", LOCATIONS[name])
        for batch, name in product((2, 8), LOCATIONS)
    ],
    "blocks": [f"block --size 1024 50 84 --dtype {dtype}" for dtype in ("bfloat16", "float32")],
}
QUICK = {
    "correctness": ["correctness --size 16 5 6"],
    "kernels": ["op --size 4 2 3 --subsamples pool_conv none"],
    "models": [MODEL.format(1, "R_50", "bfloat16", "res4.-2 --image-size 64 96")],
    "blocks": ["block --size 4 2 4 --subsamples none --functions embedded_gaussian"],
}


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny inputs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("gpu_results"), help="folder")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    start, failed = time.perf_counter(), []
    for part in args.parts:
        for number, command in enumerate((QUICK if args.quick else COMMANDS)[part]):
            print(f"{time.perf_counter() - start:.0f} s: {command}", flush=True)
            file = args.output / f"{part}_{number}.json"
            options = ["--device", args.device, "--rounds", str(args.rounds), "--output", str(file)]
            status = subprocess.call([sys.executable, str(BENCHMARK), *command.split(), *options])
            if status:
                failed.append(f"{command}: exit status {status}")
    if failed:
        sys.exit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main(sys.argv[1:])
