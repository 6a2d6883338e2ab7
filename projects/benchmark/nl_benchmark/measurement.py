"""Measured rows, the files that hold them, and the tables made from them."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from itertools import accumulate, groupby
from pathlib import Path
from statistics import median
from textwrap import shorten
from timeit import timeit
from typing import Any

import torch
from scipy.stats import binom
from tabulate import tabulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer  # waits for the GPU

from nl_detectron.engine import environment
from nl_detectron.files import write_atomically

from .competitors import FLOOR, Competitors

MIN_SECONDS = 0.2  # a faster call is repeated in each round, for about this long
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler logs each start and stop


def measure(competitors: Competitors, rounds: int, device: str) -> Iterator[dict[str, Any]]:
    """Time the competitors in turn, once per round, after a warm-up.

    Yields a row for each competitor when a pass is finished: "seconds" of a call in each round and
    "peak_bytes" that it allocates, or "failure": an error, or a result other than the first one's.
    """
    # The clock needs fewer calls where it waits for the GPU alone.
    shortest = MIN_SECONDS / 10 if device == "cuda" else MIN_SECONDS
    for pass_name in next(iter(competitors.values())):
        rows = [{"pass": pass_name, "competitor": name, "seconds": []} for name in competitors]
        repeats, expected = {}, None
        for round_number in range(rounds + 1):
            for row in [row for row in rows if "failure" not in row]:
                name = row["competitor"]
                call = competitors[name][pass_name]
                try:
                    if round_number == 0:
                        result = call()
                        expected = expected or result  # that of the first competitor
                        if name != FLOOR and not agrees(result, expected):
                            raise AssertionError("another result")
                        row["peak_bytes"] = peak_bytes(call, device)
                        repeats[name] = math.ceil(shortest / timeit(call, timer=timer, number=1))
                    else:
                        seconds = timeit(call, timer=timer, number=repeats[name]) / repeats[name]
                        row["seconds"].append(float(f"{seconds:.4g}"))
                except Exception as error:  # a compiler raises errors of its own
                    row["failure"] = shorten(repr(error), 110)
        yield from rows


def agrees(results: list[Tensor], expected: list[Tensor]) -> bool:
    """Return whether tensors are the same but for rounding in their type."""
    pairs = zip(results, expected, strict=True)
    return all((a - b).norm() <= torch.finfo(b.dtype).eps ** 0.5 * b.norm() for a, b in pairs)


def peak_bytes(call: Callable, device: str) -> int:
    """Return the peak of the tensors that a call allocates; on a CPU, as the profiler sees it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in events), initial=0))  # negative where it is freed


def circumstances(command: str, device: str) -> dict[str, Any]:
    """Return the command, the machine and the versions, which a result file begins with."""
    cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    machine = torch.cuda.get_device_name() if device == "cuda" else cpu
    versions = {d.name: d.version for d in distributions() if d.name in ("mmcv-lite", "timm")}
    result = {"command": command, "machine": machine, "environment": environment() | versions}
    return result | {"threads": torch.get_num_threads()}


def save(results: dict[str, Any], path: Path) -> None:
    """Write results as JSON, one row per line."""
    with write_atomically(path, "w") as file:
        file.write(json.dumps(results).replace('{"facts"', '\n{"facts"') + "\n")


def write_tables(readme: Path, folder: Path) -> None:
    """Write the tables of all results in a folder between the two markers of a README."""
    before, rest = readme.read_text("utf-8").split(BEGIN)
    _, after = rest.split(END)
    parts = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text("utf-8"))
        where = "{machine}, {threads} threads, {dtype}, torch {torch}, commit {commit}"
        where = where.format(**results, **results["environment"])
        parts += [f"`python {results['command']}`", where, table(results["rows"])]
    with write_atomically(readme, "w") as file:
        file.write("\n\n".join([before + BEGIN.strip(), *parts, END + after]))


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a line per comparison and pass, and a column per competitor.

    The first competitor gets its median time and peak memory; the others get ratios to these. The
    last column is the time of the matrix products alone, by torch.mm, over the time of ours.
    """
    lines = []
    for facts, group in groupby(rows, key=lambda row: {**row["facts"], "pass": row["pass"]}):
        compared = {row["competitor"]: row for row in group}
        reference = next(iter(compared.values()))
        floor, ours = compared.pop(FLOOR, None), compared.get("nl_detectron")
        cells = {name: _cell(row, reference) for name, row in compared.items()}
        if floor and "failure" not in floor | ours:
            cells["share of matrix rate"] = paired_ratio(floor["seconds"], ours["seconds"])
        lines.append({**facts, **cells})
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def _cell(row: dict[str, Any], reference: dict[str, Any]) -> str:
    if "failure" in row:
        return row["failure"]
    if "errors" in row:
        return ", ".join(f"{error:.3g}" for error in row["errors"])
    if row is reference or "failure" in reference:
        seconds = median(row["seconds"])
        time = f"{seconds:.4g} s" if seconds >= 1 else f"{1e3 * seconds:.4g} ms"
        return f"{time}, {row['peak_bytes'] / 2**20:,.0f} MiB"
    memory = row["peak_bytes"] / reference["peak_bytes"]
    return f"time {paired_ratio(row['seconds'], reference['seconds'])}, memory {memory:.3g}"


def paired_ratio(seconds: list[float], reference: list[float]) -> str:
    """Return the median of the rounds' ratios of times, with its 95% confidence interval.

    A slow phase of the machine affects both times of a ratio, which are of the same round. The
    interval is between two order statistics; with fewer than 6 rounds it is the range.
    """
    ratios = sorted(own / other for own, other in zip(seconds, reference, strict=True))
    skipped = max(int(binom.ppf(0.025, len(ratios), 0.5)) - 1, 0)
    return f"{median(ratios):.3g} ({ratios[skipped]:.3g} to {ratios[-1 - skipped]:.3g})"
