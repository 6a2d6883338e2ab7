#!/usr/bin/env python
"""Train the rows that the results do not have, in several processes, and write the tables."""

import argparse
import json
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import detectron2
import torch
from long_range import measures, rows, training
from long_range.recall import dataset_root
from long_range.report import RESULTS, read_results, write_tables
from long_range.rows import Row
from tqdm import tqdm

ROWS = {row.name: row for table in rows.TABLES.values() for row in table}
_fork = get_context("fork")  # workers share the images, which are read before
_images: dict[tuple[int, str], training.Images] = {}  # (K, split) -> images


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--report", action="store_true", help="only write the tables")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    add("--seeds", nargs="+", type=int, help="default: 1 to 5, or to 3 for the widths")
    add("--device", default="cpu")
    add("--workers", type=int, default=1, help="number of processes")
    add("--deadline", type=float, default=1e9, metavar="SECONDS", help="no run starts after it")
    add("--output", type=Path, default=Path("output/long_range"), help="folder of weights")
    add("--results", type=Path, default=RESULTS, help="file with one line per run")
    args = parser.parse_args(argv)
    if not args.report:
        deadline = time.time() + args.deadline
        selected = [ROWS[name] for name in args.rows]
        runs = [(row, s) for row in selected for s in args.seeds or range(1, row.seeds + 1)]
        run_all(runs, args.results, args.output, args.device, args.workers, deadline)
    if args.results == RESULTS:
        write_tables(read_results(RESULTS))


def run_all(
    runs: Iterable[tuple[Row, int]],
    results: Path,
    output: Path,
    device: str = "cpu",
    workers: int = 1,
    deadline: float = float("inf"),
) -> None:
    """Append a line to the results for each row and seed that they do not have.

    No run starts after the deadline, in seconds since the epoch.
    """
    output.mkdir(parents=True, exist_ok=True)
    present = {(line["digest"], line["seed"]) for line in read_results(results)}
    todo = {(row.digest(), seed): (row, seed) for row, seed in runs}
    todo = [run for key, run in todo.items() if key not in present]
    _read_images({row.keys for row, _ in todo} | {8})
    _append(results, (line for line in _guesses() if (line["digest"], line["seed"]) not in present))

    groups: dict[str, tuple[Row, list[int]]] = {}  # the seeds of a row are trained together
    for row, seed in todo:
        groups.setdefault(row.digest(), (row, []))[1].append(seed)
    warm_ups: dict[int, list[int]] = {}  # depth -> seeds
    for depth, seed in dict.fromkeys((row.depth, seed) for row, seed in todo if row.warm_up):
        if not _warm_up_file(output, depth, seed).is_file():
            warm_ups.setdefault(depth, []).append(seed)
    with ProcessPoolExecutor(workers, _fork, torch.set_num_threads, (1,)) as pool:
        for function, items in ((_warm_up, warm_ups.items()), (_run, groups.values())):
            function = partial(function, output, device, deadline)
            _append(results, _results(pool, function, items))


def _read_images(numbers_of_keys: Iterable[int]) -> None:
    with ProcessPoolExecutor(mp_context=_fork) as pool:  # generates the datasets
        list(pool.map(dataset_root, numbers_of_keys))
    for keys in numbers_of_keys:
        for split in ("train", "val"):
            _images[keys, split] = training.load_images(keys, split)


@cache
def _on_device(keys: int, split: str, device: str) -> training.Images:
    return _images[keys, split].to(device)


def _guesses() -> Iterator[dict]:
    """Yield the results of guesses with different knowledge."""
    for keys, split in _images:
        for knowledge in ("nothing", "colours") if split == "val" else ():
            name = f"knows {knowledge}, K = {keys}"
            for seed in range(1, 6):
                scores = measures.guess(_images[keys, split], knowledge, seed)
                ap50 = measures.locks_ap50(scores, keys)
                yield {"row": name, "digest": name, "seed": seed, "locks AP50": ap50}


def _results(
    pool: ProcessPoolExecutor, function: Callable, items: Iterable[tuple]
) -> Iterator[dict]:
    """Call a function for each item in the pool, and yield all results; report failures."""
    futures = {pool.submit(function, *item): item for item in items}
    for future in tqdm(as_completed(futures), function.func.__name__, len(futures)):
        if future.exception() is None:
            yield from future.result()
        else:
            print("failed:", *futures[future])
            traceback.print_exception(future.exception())


def _append(results: Path, lines: Iterable[dict]) -> None:
    for line in lines:
        rounded = json.loads(json.dumps(line), parse_float=lambda text: float(f"{float(text):.4g}"))
        with open(results, "a") as file:
            file.write(json.dumps(rounded) + "\n")


def _warm_up_file(output: Path, depth: int, seed: int) -> Path:
    return output / f"warm_up_R{depth}_seed{seed}.pth"


def _warm_up(output: Path, device: str, deadline: float, depth: int, seeds: list[int]) -> list:
    """Train networks without a block, and save their weights."""
    if time.time() >= deadline:
        return []
    row = Row("", block=None, depth=depth, optimizer="SGD", warm_up=0, iterations=rows.WARM_UP)
    nets = {seed: training.build_net(row, seed)[0].to(device) for seed in seeds}
    training.train(nets, row, _on_device(row.keys, "train", device))
    for seed, net in nets.items():
        weights = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
        torch.save(weights, _warm_up_file(output, depth, seed))
    return []


def _run(output: Path, device: str, deadline: float, row: Row, seeds: list[int]) -> list[dict]:
    """Train and measure the networks of a row, and return lines of the results."""
    start = time.time()
    if start >= deadline:
        return []
    images, validation = (_on_device(row.keys, split, device) for split in ("train", "val"))
    nets, blocks = {}, {}
    for seed in seeds:
        weights = torch.load(_warm_up_file(output, row.depth, seed)) if row.warm_up else None
        net, blocks[seed] = training.build_net(row, seed, weights)
        nets[seed] = net.to(device)
    curves = training.train(nets, row, images, validation)

    lines = []
    for seed, net in nets.items():
        if seed == 1 and row in rows.MAIN:  # for figure.py
            half = {name: tensor.half().cpu() for name, tensor in net.state_dict().items()}
            torch.save(half, output / f"{row.digest()}.pth")
        line = {"row": row.name, "digest": row.digest(), "seed": seed, "accuracy": curves[seed]}
        line |= measures.evaluate(net, validation) | measures.cost(net)
        line |= measures.attention(net, blocks[seed], validation)
        line["seconds"] = (time.time() - start) / len(seeds)
        line["machine"] = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
        line["versions"] = f"torch {torch.__version__}, detectron2 {detectron2.__version__}"
        lines.append(line)
    return lines


if __name__ == "__main__":
    main()
