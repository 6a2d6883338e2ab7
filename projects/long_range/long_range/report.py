"""Write the tables of the study into Markdown files, from the results alone."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from tabulate import tabulate

from .rows import TABLES
from .training import EVALUATE_EVERY

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "results.jsonl"
DETECTORS = PROJECT / "detectors.jsonl"  # of detector.py
DETECTOR_ROWS = {
    "baseline": "no block, AdamW",
    "scratch": "AdamW and unit norm, from scratch",
    "inserted": "AdamW and unit norm, inserted",
    "scratch_sgd": "SGD and default block, from scratch",
    "inserted_sgd": "SGD and default block, inserted",
}
PAGES = [PROJECT / page for page in ("README.md", "../../README.md", "../../docs/TRAINING_TIPS.md")]


def read_results(path: Path) -> list[dict]:
    """Return the lines of a file, which need not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_tables(results: Sequence[dict], pages: Sequence[Path] = PAGES) -> None:
    """Replace the text between ``<!-- table NAME -->`` and ``<!-- end -->`` in Markdown files."""
    named = {table: [(row.name, row.digest()) for row in rows] for table, rows in TABLES.items()}
    guesses = {line["row"] for line in results if "accuracy" not in line}
    named["guesses"] = [(name, name) for name in sorted(guesses)]
    tables = {table: _table(rows, results) for table, rows in named.items()}
    tables["detectors"] = _detector_table(read_results(DETECTORS))
    pattern = re.compile(r"(<!-- table (\w+) -->).*?(<!-- end -->)", re.DOTALL)
    for page in pages:
        text = page.read_text()
        page.write_text(pattern.sub(lambda m: f"{m[1]}\n\n{tables[m[2]]}\n\n{m[3]}", text))


def iterations_until_90(lines: Sequence[dict]) -> list[str]:
    """Return, for each run, the first iteration with an accuracy of 90%, or "-", in order."""
    found = [[i for i, a in enumerate(line["accuracy"], start=1) if a >= 0.9] for line in lines]
    first = sorted(EVALUATE_EVERY * reached[0] for reached in found if reached)
    return [str(i) for i in first] + ["-"] * (len(lines) - len(first))


def _table(rows: Sequence[tuple[str, str]], results: Sequence[dict]) -> str:
    """Return a table with a line for each (name, digest) that has results."""
    cells = []
    for name, digest in rows:
        lines = [line for line in results if line["digest"] == digest]
        if not lines:
            continue
        cells.append({"": name, "locks AP50": _mean(lines, "locks AP50")})
        if "accuracy" in lines[0]:  # else a guess
            # Without a softmax, weights can be negative or do not sum to 1.
            softmax = name not in ("dot product", "concatenation")
            cells[-1] |= {
                "lowest": f"{min(line['locks AP50'] for line in lines):.1f}",
                "90% after": ", ".join(iterations_until_90(lines)),
                "on own key, %": _mean(lines, "on key") if softmax else "",
                "difference": _mean(lines, "difference", digits=2) if softmax else "",
                "parameters": f"{lines[0]['parameters']:,}",
                "multiply-adds": f"{lines[0]['multiply-adds'] / 1e6:.1f} M",
            }
    return tabulate(cells, "keys", "github", disable_numparse=True)


def _detector_table(results: Sequence[dict]) -> str:
    """Return a table with a line for each kind of run of detector.py."""
    cells = []
    for row, title in DETECTOR_ROWS.items():
        lines = [line for line in results if line["row"] == row]
        if not lines:
            continue
        cells.append({"": title, "seeds": len(lines), "locks AP": _mean(lines, "locks AP")})
        cells[-1]["lowest"] = f"{min(line['locks AP'] for line in lines):.1f}"
        cells[-1] |= {metric: _mean(lines, metric) for metric in ("keys AP", "mask AP")}
    return tabulate(cells, "keys", "github", disable_numparse=True)


def _mean(lines: Sequence[dict], metric: str, digits: int = 1) -> str:
    """Return mean and standard deviation of a metric, or "" if no run has it."""
    values = [line[metric] for line in lines if metric in line]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}" if values else ""
