"""Write the tables of the study into Markdown files, from the results alone."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from tabulate import tabulate

from .rows import TABLES, Row
from .training import EVALUATE_EVERY

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "results.jsonl"
PAGES = (PROJECT / "README.md", PROJECT.parents[1] / "docs/TRAINING_TIPS.md")


def read_results(path: Path) -> list[dict]:
    """Return the lines of a file, which need not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_tables(results: Sequence[dict], pages: Sequence[Path] = PAGES) -> None:
    """Replace the text between ``<!-- table NAME -->`` and ``<!-- end -->`` in Markdown files."""
    guesses = dict.fromkeys(line["row"] for line in results if "accuracy" not in line)
    cells = {name: [_cells(row, results) for row in rows] for name, rows in TABLES.items()}
    cells["guesses"] = [
        {"": g, "locks AP50": _mean(_of(g, results), "locks AP50")} for g in guesses
    ]
    cells["widths"] = _width_cells(results)
    for page in pages:
        text = re.sub(
            r"(<!-- table (\w+) -->).*?(<!-- end -->)",
            lambda match: f"{match[1]}\n\n{_markdown(cells[match[2]])}\n\n{match[3]}",
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


def _cells(row: Row, results: Sequence[dict]) -> dict[str, str]:
    lines = _of(row.digest(), results)
    if not lines:
        return {}
    signed = row.options.get("instantiation") == "dot_product"  # its strongest is not its maximum
    return {
        "": row.name,
        "locks AP50": _mean(lines, "locks AP50"),
        "lowest": f"{min(line['locks AP50'] for line in lines):.1f}",
        "90% after": ", ".join(iterations_until_90(lines)),
        "on own key, %": "" if signed else _mean(lines, "on key"),
        "difference": _mean(lines, "difference", digits=2),
        "parameters": f"{lines[0]['parameters']:,}",
        "multiply-adds": f"{lines[0]['multiply-adds'] / 1e6:.1f} M",
    }


def _width_cells(results: Sequence[dict]) -> list[dict[str, str]]:
    cells: dict[str, dict[str, str]] = {}  # one line for all widths D
    for row in TABLES["widths"]:
        name, width = row.name.rsplit(", ", 1)
        lines = _of(row.digest(), results)
        cells.setdefault(name, {"": name})[width] = _mean(lines, "locks AP50")
    return list(cells.values())


def _of(digest: str, results: Sequence[dict]) -> list[dict]:
    return [line for line in results if line["digest"] == digest]


def _mean(lines: Sequence[dict], metric: str, digits: int = 1) -> str:
    """Return mean and standard deviation of a metric, or "" if no run has it."""
    values = [line[metric] for line in lines if metric in line]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}" if values else ""


def _markdown(cells: list[dict[str, str]]) -> str:
    return tabulate(list(filter(None, cells)), "keys", "github", disable_numparse=True)
