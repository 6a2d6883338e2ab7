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
PAGES = (PROJECT / "README.md", PROJECT.parents[1] / "docs/TRAINING_TIPS.md")


def read_results(path: Path) -> list[dict]:
    """Return the lines of a file, which need not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_tables(results: Sequence[dict], pages: Sequence[Path] = PAGES) -> None:
    """Replace the text between ``<!-- table NAME -->`` and ``<!-- end -->`` in Markdown files."""
    names = {name: [(row.name, row.digest()) for row in rows] for name, rows in TABLES.items()}
    guesses = dict.fromkeys(line["row"] for line in results if "accuracy" not in line)
    names["guesses"] = [(name, name) for name in sorted(guesses)]
    for page in pages:
        text = re.sub(
            r"(<!-- table (\w+) -->).*?(<!-- end -->)",
            lambda match: f"{match[1]}\n\n{_table(names[match[2]], results)}\n\n{match[3]}",
            page.read_text(),
            flags=re.DOTALL,
        )
        page.write_text(text)


def iterations_until_90(lines: Sequence[dict]) -> list[str]:
    """Return, for each run, the first iteration with an accuracy of 90%, or "-", in order."""
    found = []
    for line in lines:
        reached = [i for i, accuracy in enumerate(line["accuracy"], start=1) if accuracy >= 0.9]
        found.append(EVALUATE_EVERY * reached[0] if reached else None)
    return [str(i) for i in sorted(filter(None, found))] + ["-"] * found.count(None)


def _table(rows: Sequence[tuple[str, str]], results: Sequence[dict]) -> str:
    """Return a table with a line for each (name, digest) that has results."""
    cells = []
    for name, digest in rows:
        lines = [line for line in results if line["digest"] == digest]
        if not lines:
            continue
        cells.append({"": name, "locks AP50": _mean(lines, "locks AP50")})
        if "accuracy" in lines[0]:  # else a guess
            # The weights of the others have signs, or do not sum to 1.
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


def _mean(lines: Sequence[dict], metric: str, digits: int = 1) -> str:
    """Return mean and standard deviation of a metric, or "" if no run has it."""
    values = [line[metric] for line in lines if metric in line]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}" if values else ""
