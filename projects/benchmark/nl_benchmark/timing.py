"""Time and peak memory of competitors that run in turn."""

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from statistics import quantiles
from textwrap import shorten
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .competitors import Competitors

MIN_SECONDS = 0.2  # a faster call is repeated in each round, for about this long
MIN_ROUNDS = 5
MAX_SPREAD = 0.2  # interquartile range over median
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler logs each start and stop


def paired_ratio(seconds: list[float], reference: list[float]) -> str:
    """Return the median of the rounds' ratios of times with their quartiles, if it is stable.

    A ratio is taken in each round, so that a slow phase of the machine affects both of its times.
    """
    ratios = [own / other for own, other in zip(seconds, reference, strict=True)]
    if len(ratios) < MIN_ROUNDS:
        return f"unstable (fewer than {MIN_ROUNDS} rounds)"
    low, median, high = quantiles(ratios, n=4, method="inclusive")
    if high - low > MAX_SPREAD * median:
        return f"unstable (spread {(high - low) / median:.0%})"
    return f"{median:.3g} ({low:.3g} to {high:.3g})"


def check_agreement(competitors: Competitors) -> None:
    """Raise AssertionError if a call does not return the first competitor's tensors."""
    reference, *others = competitors
    for pass_name, call in competitors[reference].items():
        expected = call()
        for name in others:
            with suppress(RuntimeError):  # the call itself fails: measure() records the reason
                tensors, text = competitors[name][pass_name](), f"{name} differs in {pass_name}"
                torch.testing.assert_close(tensors, expected, rtol=1e-9, atol=1e-9, msg=text)


def measure(competitors: Competitors, rounds: int, device: str) -> list[dict[str, Any]]:
    """Time the competitors in turn, once per round, after a warm-up.

    Returns a row for each pass and competitor: "seconds" of a call in each round and "peak_bytes"
    that a call allocates, or "failure", the error that a call raised, for example lack of memory.
    """
    results = []
    for pass_name in next(iter(competitors.values())):
        rows = [{"pass": pass_name, "competitor": name, "seconds": []} for name in competitors]
        repeats = {}
        for round_number in range(rounds + 1):
            for row in [row for row in rows if "failure" not in row]:
                name = row["competitor"]
                call = competitors[name][pass_name]
                try:
                    if round_number == 0:
                        call()
                        row["peak_bytes"] = peak_bytes(call, device)
                        repeats[name] = math.ceil(MIN_SECONDS / seconds_per_call(call, 1, device))
                    else:
                        seconds = seconds_per_call(call, repeats[name], device)
                        row["seconds"].append(float(f"{seconds:.4g}"))
                except (MemoryError, RuntimeError) as error:
                    row["failure"] = shorten(f"{type(error).__name__}: {error}", 110)
        results += rows
    return results


def seconds_per_call(call: Callable, repeats: int, device: str) -> float:
    """Return the mean wall-clock time of a call, including the GPU work that it starts."""
    # Not torch.utils.benchmark.Timer, which adds two calls. Some calls take a minute.
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
