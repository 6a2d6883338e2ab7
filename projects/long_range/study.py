#!/usr/bin/env python
"""Train the runs that the results lack, in several processes, and write the tables."""

import argparse
import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from long_range import measures, rows, training
from long_range.report import RESULTS, read_results, write_tables
from long_range.rows import ROWS, TABLES, Row
from tqdm import tqdm

_images: dict[tuple[int, str], training.Images] = {}  # (K, split) -> images


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--report", action="store_true", help="only write the tables")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    add("--seeds", nargs="+", type=int, help="default: 1 to 5, or to 3 for the widths")
    add("--device", default="cpu")
    add("--workers", type=int, default=1, help="number of processes")
    add("--output", type=Path, default=Path("output/long_range"), help="folder of weights")
    add("--results", type=Path, default=RESULTS, help="file with one line per run")
    args = parser.parse_args(argv)
    if not args.report:
        run_missing(args)
    if args.results == RESULTS:
        write_tables(read_results(RESULTS))


def run_missing(args: argparse.Namespace) -> None:
    """Train each row and seed that the results lack, and append a line for it."""
    present = {(line["digest"], line["seed"]) for line in read_results(args.results)}
    runs: dict[str, tuple[Row, list[int]]] = {}  # the seeds of a row are trained together
    warm_ups: dict[int, list[int]] = {}  # depth -> seeds
    args.output.mkdir(parents=True, exist_ok=True)
    for row in (ROWS[name] for name in args.rows):
        for seed in args.seeds or range(1, row.seeds + 1):
            if (row.digest(), seed) not in present:
                present.add((row.digest(), seed))  # equal rows share their runs
                runs.setdefault(row.digest(), (row, []))[1].append(seed)
                seeds = warm_ups.setdefault(row.depth, [])
                if seed not in seeds and not _warm_up_file(args, row.depth, seed).is_file():
                    seeds.append(seed)

    numbers_of_keys = {row.keys for row, _ in runs.values()} | {8}  # warm-ups have 8
    for keys, split in itertools.product(numbers_of_keys, ("train", "val")):
        _images[keys, split] = training.load_images(keys, split)
    first = [partial(_warm_up, args, *item) for item in warm_ups.items() if item[1]]
    unknown = [k for k in numbers_of_keys if (f"colours, K = {k}", 1) not in present]
    first += [partial(_guess, keys) for keys in unknown]
    fork = get_context("fork")  # workers share the memory of the images
    with ProcessPoolExecutor(args.workers, fork, torch.set_num_threads, (1,)) as pool:
        for calls in (first, [partial(_run, args, *run) for run in runs.values()]):
            futures = [pool.submit(call) for call in calls]
            for future in tqdm(as_completed(futures), total=len(futures)):
                with open(args.results, "a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in future.result())


def _guess(keys: int) -> list[dict]:
    """Measure random guesses, and guesses that know how many keys have each colour."""
    lines = []
    for what, seed in itertools.product(("nothing", "colours"), range(1, 4)):
        scores = measures.guess(_images[keys, "val"], what == "colours", seed)
        name, ap50 = f"{what}, K = {keys}", measures.locks_ap50(scores, keys)
        lines.append({"row": name, "digest": name, "seed": seed, "locks AP50": ap50})
    return lines


def _warm_up_file(args: argparse.Namespace, depth: int, seed: int) -> Path:
    return args.output / f"warm_up_R{depth}_seed{seed}.pth"


def _warm_up(args: argparse.Namespace, depth: int, seeds: list[int]) -> list:
    """Train networks without a block, and save their weights."""
    row = Row("", block=None, depth=depth, optimizer="SGD", iterations=rows.WARM_UP)
    nets = {seed: training.build_net(row, seed)[0].to(args.device) for seed in seeds}
    training.train(nets, row, _images[row.keys, "train"].to(args.device))
    for seed, net in nets.items():
        torch.save(net.cpu().state_dict(), _warm_up_file(args, depth, seed))
    return []


def _run(args: argparse.Namespace, row: Row, seeds: list[int]) -> list[dict]:
    """Train and measure the networks of a row, and return lines of the results."""
    images, validation = (_images[row.keys, split].to(args.device) for split in ("train", "val"))
    nets, blocks = {}, {}
    for seed in seeds:
        weights = torch.load(_warm_up_file(args, row.depth, seed)) if row.warm_up else None
        net, blocks[seed] = training.build_net(row, seed, weights)
        nets[seed] = net.to(args.device)
    curves = training.train(nets, row, images, validation)

    lines = []
    for seed, net in nets.items():
        if seed == 1 and row in TABLES["main"]:  # for figure.py
            torch.save(net.state_dict(), args.output / f"{row.digest()}.pth")
        line = {"row": row.name, "digest": row.digest(), "seed": seed, "accuracy": curves[seed]}
        line |= measures.measure(net, blocks[seed], validation)
        lines.append(line | {"device": args.device, "torch": torch.__version__})
    return lines


if __name__ == "__main__":
    main()
