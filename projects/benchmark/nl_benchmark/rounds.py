"""Competitors in turn: the one loop that all benchmarks share."""

import math
import time
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from .peak_memory import is_out_of_memory, peak_bytes

BLOCK_SECONDS = 0.2  # what is quicker is called several times per round, to last about so long
MAX_DIFFERENCE = 0.5  # in the precision that is timed; rounding in bfloat16 can reach 0.1
MAX_DIFFERENCE_FLOAT64 = 1e-9

Call = Callable[[], List[Tensor]]


@dataclass(frozen=True)
class Case:
    """One competitor. The first of a list is the reference of the others.

    Attributes:
        competitor: its name.
        facts: what is known before it runs, such as its size; these become columns of the table.
        build: makes what it needs, and returns one call for each pass, such as "forward". The
            tensors that a call returns are those that must be equal to the reference's.
        standing_bytes: what of its memory stands before and after a call: inputs, weights.
        note: what had to be set right to compare it, or where its function differs.
    """

    competitor: str
    facts: Dict[str, Any]
    build: Callable[[], Dict[str, Call]]
    standing_bytes: int
    note: str = ""


@dataclass
class Row:
    """What was measured of one pass of one competitor.

    Attributes:
        seconds: of one call, a number per round; empty if it failed.
        peak_bytes: at the worst moment of a call, with ``standing_bytes``.
        difference: the largest between its tensors and the reference's, over the largest value;
            None for the reference itself, and where it failed.
        failure: why it was not measured, otherwise empty.
    """

    competitor: str
    pass_name: str
    facts: Dict[str, Any]
    standing_bytes: int
    note: str
    seconds: List[float] = field(default_factory=list)
    peak_bytes: Optional[int] = None
    difference: Optional[float] = None
    failure: str = ""


class _Runner:
    """One pass of one competitor; what goes wrong goes into its row."""

    def __init__(self, case: Case, pass_name: str, calls: Dict[str, Call], failure: str):
        self.row = Row(case.competitor, pass_name, case.facts, case.standing_bytes, case.note)
        self.row.failure = failure
        self._call = calls.get(pass_name)
        self._device = ""
        self._number = 1

    def warm_up(self, reference: Optional[List[Tensor]], device: str) -> Optional[List[Tensor]]:
        """Run it until it can be timed; return its tensors, or None if it failed."""

        def first() -> List[Tensor]:
            tensors = self._call()
            if reference is not None:
                self.row.difference = difference(tensors, reference)
                if not self.row.difference <= MAX_DIFFERENCE:  # NaN too
                    raise RuntimeError(f"its output differs by {self.row.difference:.2g}")
            self.row.peak_bytes = self.row.standing_bytes + peak_bytes(self._call, device)
            self._device = device
            seconds = seconds_per_call(self._call, 1, device)
            self._number = max(1, math.ceil(BLOCK_SECONDS / seconds))
            return tensors

        return self._try(first)

    def time(self) -> None:
        seconds = self._try(lambda: seconds_per_call(self._call, self._number, self._device))
        if seconds is not None:
            self.row.seconds.append(seconds)

    def _try(self, function: Callable) -> Any:
        if self.row.failure:
            return None
        try:
            return function()
        except (RuntimeError, MemoryError) as error:
            self.row.failure = failure(error)
            self.row.seconds.clear()
            return None


def measure(cases: Sequence[Case], rounds: int, device: str, progress: tqdm) -> List[List[Row]]:
    """Time the competitors in turn, ``rounds`` times.

    Args:
        cases: their passes have the same names.
        rounds: of measurements, after a warm-up.
        device: "cpu" or "cuda".
        progress: a bar that gets one step per case; its text says what is running.

    Returns:
        One list for each pass, in it one row for each case.
    """
    calls, failures = [], []
    for case in cases:
        progress.set_postfix_str(f"{case.competitor}: building")
        try:
            calls.append(case.build())
            failures.append("")
        except (RuntimeError, MemoryError) as error:
            calls.append({})
            failures.append(failure(error))

    results = []
    for pass_name in dict.fromkeys(name for named in calls for name in named):
        runners = [_Runner(case, pass_name, *of) for case, *of in zip(cases, calls, failures)]
        reference = None
        for runner in runners:
            progress.set_postfix_str(f"{runner.row.competitor}, {pass_name}: warming up")
            tensors = runner.warm_up(reference, device)
            reference = tensors if runner is runners[0] else reference
        del tensors
        for i in range(rounds):
            progress.set_postfix_str(f"{pass_name}, round {i + 1} of {rounds}")
            for runner in runners:
                runner.time()
            progress.update()
        results.append([runner.row for runner in runners])
    return results


def seconds_per_call(call: Call, number: int, device: str) -> float:
    """The mean wall-clock time of ``number`` calls, the work that they leave to a GPU included.

    torch's own Timer would call twice more before each measurement; here that is done, and some
    calls take a minute.
    """
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    finish()
    start = time.perf_counter()
    for _ in range(number):
        call()
    finish()
    return (time.perf_counter() - start) / number


def check_agreement(cases: Sequence[Case]) -> None:
    """Raise if a competitor does not compute what the first one does; the cases are in float64.

    A pass that a competitor cannot run at all is left to its row in the table.

    Raises:
        RuntimeError: naming the competitor, the pass and the difference.
    """
    expected = {pass_name: call() for pass_name, call in cases[0].build().items()}
    for case in cases[1:]:
        for pass_name, call in case.build().items():
            try:
                tensors = call()
            except RuntimeError:
                continue
            apart = difference(tensors, expected[pass_name])
            if not apart <= MAX_DIFFERENCE_FLOAT64:
                raise RuntimeError(
                    f"{case.competitor} is not the function of {cases[0].competitor}: "
                    f"{case.facts}, {pass_name}, differs by {apart:.2g} in float64"
                )


def difference(tensors: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest difference over the reference's largest value, of the worst tensor.

    NaN if a value is not finite, or the shapes differ.
    """
    worst = torch.zeros(())
    for own, other in zip(tensors, reference, strict=True):
        if own.shape != other.shape:
            return math.nan
        if own.numel():
            dtype = torch.promote_types(other.dtype, torch.float32)
            own, other = own.to(dtype), other.to(dtype)
            apart = (own - other).abs().max() / other.abs().max()
            worst = torch.maximum(worst, apart.cpu())  # which keeps NaN
    return worst.item()


def failure(error: Exception) -> str:
    """A line for the table."""
    if is_out_of_memory(error):
        return "out of memory"
    return f"fails: {shorten(str(error).splitlines()[0], 110)}"
