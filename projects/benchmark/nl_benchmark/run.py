"""From comparisons to a table, and to files."""

import importlib.util
from pathlib import Path
from typing import List, Optional

from tqdm import tqdm

from ...engine.errors import UserError
from .peak_memory import limit_cpu_memory
from .plot import plot
from .record import Record, machine, save, versions
from .rounds import Case, check_agreement, measure
from .table import markdown_table

REQUIRED = ("matplotlib", "mmcv", "timm")
PASSES = 2


def run(
    bench: str,
    comparisons: List[List[Case]],
    agreement: List[List[Case]],
    *,
    command: str,
    device: str,
    dtype: str,
    rounds: int,
    output: Optional[Path] = None,
) -> None:
    """Print the table of a benchmark, and write it to files.

    On a CPU this process can have no more memory from here on than is free now, so that what needs
    more becomes a row that says so.

    Args:
        comparisons: what is timed. The list is emptied, and with each of its items goes what that
            item keeps in memory.
        agreement: the same, small and in float64; compared before anything is timed.
        output: path of the files without their suffix; None writes none.

    Raises:
        UserError: a library of the competitors is missing.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: pip install -e .[bench]")
    for cases in agreement:
        check_agreement(cases)
    if device == "cpu":
        limit_cpu_memory()

    record = Record(bench, command, device, dtype, rounds, machine(device), versions(), [])
    with tqdm(total=len(comparisons) * PASSES * rounds, unit="round") as progress:
        while comparisons:
            cases = comparisons.pop(0)
            progress.set_description(" ".join(map(str, cases[0].facts.values())))
            record.comparisons.extend(measure(cases, rounds, device, progress))
            if output is not None:  # now, since what comes next may take hours
                save(record, output)
                output.with_suffix(".md").write_text(markdown_table(record) + "\n", "utf-8")
    print(markdown_table(record))
    if output is not None:
        plot(record, output.with_suffix(".png"))
