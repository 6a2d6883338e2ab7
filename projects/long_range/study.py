#!/usr/bin/env python
"""Train the rows that the results do not have, in several processes, and write the tables."""

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import detectron2
import torch
from long_range import measures, training
from long_range.recall import dataset_root
from long_range.report import RESULTS, read_results, write_tables
from long_range.rows import TABLES, Row
from tqdm import tqdm

ROWS = {row.name: row for rows in TABLES.values() for row in rows}
_fork = get_context("fork")  # workers share the memory of the images
_images: dict[tuple[int, str], training.Images] = {}  # (K, split); read before the fork


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="only write the tables")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 1 to 3 or 5, by row")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="number of processes")
    parser.add_argument(
        "--deadline",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="after which no further run starts",
    )
    parser.add_argument("--output", type=Path, default=Path("output/long_range"), metavar="DIR")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    args = parser.parse_args(argv)
    deadline = time.time() + args.deadline
    if not args.report:
        rows = [ROWS[name] for name in args.rows]
        runs = [(row, s) for row in rows for s in args.seeds or range(1, row.seeds + 1)]
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
    """Append one line to the results for each (row, seed) that they do not have.

    Args:
        output: folder of weights: those after the warm-up, and those of some rows.
        deadline: no run starts after this time, as ``time.time()`` counts it.
    """
    present = {(line["digest"], line["seed"]) for line in read_results(results)}
    todo = {(row.digest(), seed): (row, seed) for row, seed in runs}
    todo = [run for key, run in todo.items() if key not in present]
    output.mkdir(parents=True, exist_ok=True)
    read_images({row.keys for row, _ in todo} | {8})
    append = partial(_append, results)
    for line in references(read_results(results)):
        append(line)

    starts = dict.fromkeys((row.depth, seed) for row, seed in todo if row.warm_up)
    starts = [start for start in starts if not _warm_up_file(output, *start).is_file()]
    with ProcessPoolExecutor(workers, _fork, torch.set_num_threads, (1,)) as pool:
        _collect(pool, "warm-ups", partial(_warm_up, output, device, deadline), starts)
        run = partial(_run, output, device, deadline)
        _collect(pool, "runs", run, todo, append)


def read_images(numbers_of_keys: Iterable[int]) -> None:
    """Read the datasets into the memory of this process; generate them in parallel."""
    numbers_of_keys = sorted(numbers_of_keys)
    with ProcessPoolExecutor(mp_context=_fork) as pool:
        list(pool.map(dataset_root, numbers_of_keys))
    for keys in numbers_of_keys:
        for split in ("train", "val"):
            _images[keys, split] = training.load_images(keys, split)


def references(present: Sequence[dict]) -> list[dict]:
    """Return results of guessing, with different knowledge, unless they are present."""
    names = {line["row"] for line in present}
    lines = []
    for keys, split in _images:
        for knowledge in ("nothing", "colours", "everything"):
            name = f"knows {knowledge}, K = {keys}"
            for seed in range(1, 6) if split == "val" and name not in names else ():
                scores = measures.guess(_images[keys, split], knowledge, seed)
                ap50 = measures.locks_ap50(scores, keys)
                lines.append({"row": name, "digest": name, "seed": seed, "locks AP50": ap50})
    return lines


def _warm_up(output: Path, device: str, deadline: float, depth: int, seed: int) -> None:
    if time.time() < deadline:
        weights = training.warm_up(depth, seed, _on_device(8, "train", device), device)
        torch.save(weights, _warm_up_file(output, depth, seed))


def _run(output: Path, device: str, deadline: float, row: Row, seed: int) -> dict | None:
    """Train and measure one row; return None after the deadline."""
    if time.time() >= deadline:
        return None
    start = time.time()
    weights = torch.load(_warm_up_file(output, row.depth, seed)) if row.warm_up else None
    train, validation = (_on_device(row.keys, split, device) for split in ("train", "val"))
    net, blocks = training.build_net(row, seed, weights)
    curve = training.train(net.to(device), row, seed, train, validation)

    glyphs, colours = training.predict(net, validation)
    scores = colours[:, row.keys :].softmax(dim=2)
    right = (glyphs.argmax(dim=2) == validation.glyphs).float().mean()
    line = {
        "row": row.name,
        "digest": row.digest(),
        "seed": seed,
        "locks AP50": measures.locks_ap50(scores, row.keys),
        "accuracy": curve,
        "glyphs": right.item(),
        **measures.cost(net),
    }
    attending = [block for block in blocks if hasattr(block, "affinity_matrix")]
    if attending:
        hits, difference = measures.attention_on_keys(net, attending, validation[:100])
        line |= {"on key": hits, "difference": difference}
        if seed == 1:
            half = {name: tensor.half().cpu() for name, tensor in net.state_dict().items()}
            torch.save(half, output / f"{row.digest()}.pth")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    versions = f"torch {torch.__version__}, detectron2 {detectron2.__version__}"
    return line | {"seconds": time.time() - start, "machine": name, "versions": versions}


@cache
def _on_device(keys: int, split: str, device: str) -> training.Images:
    return _images[keys, split].to(device)


def _collect(
    pool: ProcessPoolExecutor,
    what: str,
    function: Callable,
    todo: Sequence[tuple],
    append: Callable[[dict], None] = lambda line: None,
) -> None:
    """Call the function for each item in the pool; report failures, and go on."""
    futures = {pool.submit(function, *item): item for item in todo}
    for future in tqdm(as_completed(futures), what, len(futures)):
        try:
            line = future.result()
        except Exception:
            print(f"failed: {futures[future]}", file=sys.stderr)
            traceback.print_exc()
        else:
            if line is not None:
                append(line)


def _append(results: Path, line: dict[str, Any]) -> None:
    rounded = json.loads(json.dumps(line), parse_float=lambda text: float(f"{float(text):.4g}"))
    with open(results, "a") as file:
        file.write(json.dumps(rounded) + "\n")


def _warm_up_file(output: Path, depth: int, seed: int) -> Path:
    return output / f"warm_up_R{depth}_seed{seed}.pth"


if __name__ == "__main__":
    main()
