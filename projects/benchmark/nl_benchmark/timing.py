"""Time and peak memory of competitors that run in turn."""

import math
import os
import time
from collections.abc import Callable
from itertools import accumulate
from statistics import median
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .competitors import FLOOR, Competitors

MIN_SECONDS = 0.2  # a faster call is repeated in each round, for about this long
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler logs each start and stop


def paired_ratio(seconds: list[float], reference: list[float]) -> str:
    """Return the median of the rounds' ratios of times, with its 95% confidence interval.

    A ratio is taken in each round, so that a slow phase of the machine affects both of its times.
    The interval is between two order statistics. With fewer than 6 rounds it is the range, which
    covers the median with less than 95%.
    """
    ratios = sorted(own / other for own, other in zip(seconds, reference, strict=True))
    n, skipped = len(ratios), 0
    while sum(math.comb(n, k) for k in range(skipped + 2)) <= 0.025 * 2**n:
        skipped += 1
    return f"{median(ratios):.3g} ({ratios[skipped]:.3g} to {ratios[-1 - skipped]:.3g})"


def agrees(results: list[Tensor], expected: list[Tensor]) -> bool:
    """Return whether tensors are the same but for rounding in their type."""
    pairs = zip(results, expected, strict=True)
    return all((a - b).norm() <= torch.finfo(b.dtype).eps ** 0.5 * b.norm() for a, b in pairs)


def measure(competitors: Competitors, rounds: int, device: str) -> list[dict[str, Any]]:
    """Time the competitors in turn, once per round, after a warm-up.

    Returns a row for each pass and competitor: "seconds" of a call in each round and "peak_bytes"
    that a call allocates, or "failure": an error, or a result other than the first competitor's.
    """
    results = []
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
                        repeats[name] = math.ceil(shortest / seconds_per_call(call, 1, device))
                    else:
                        seconds = seconds_per_call(call, repeats[name], device)
                        row["seconds"].append(float(f"{seconds:.4g}"))
                except Exception as error:  # a compiler raises errors of its own
                    row["failure"] = shorten(repr(error), 110)
        results += rows
    return results


def seconds_per_call(call: Callable, repeats: int, device: str) -> float:
    """Return the mean wall-clock time of a call, including the GPU work that it starts."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


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
