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
    tables = {name: _table(rows, results) for name, rows in TABLES.items()}
    tables["widths"] = _width_table(results)
    tables["guesses"] = _guess_table(results)
    pattern = re.compile(r"(<!-- table (\w+) -->).*?(<!-- end -->)", re.DOTALL)
    for page in pages:
        text = pattern.sub(lambda m: f"{m[1]}\n\n{tables[m[2]]}\n\n{m[3]}", page.read_text())
        page.write_text(text)


def iterations_until_90(lines: Sequence[dict]) -> list[str]:
    """Return, for each run, the first iteration with an accuracy of 90%, or "-", in order."""
    found = []
    for line in lines:
        reached = [i for i, accuracy in enumerate(line["accuracy"], start=1) if accuracy >= 0.9]
        found.append(EVALUATE_EVERY * reached[0] if reached else None)
    return [str(i) for i in sorted(filter(None, found))] + ["-"] * found.count(None)


def _table(rows: Sequence[Row], results: Sequence[dict]) -> str:
    cells = []
    for row in rows:
        lines = _lines(row.digest(), results)
        if not lines:
            continue
        signed = row.options.get("instantiation") == "dot_product"
        cells.append(
            {
                "": row.name,
                "locks AP50": _mean(lines, "locks AP50"),
                "lowest": f"{min(line['locks AP50'] for line in lines):.1f}",
                "90% after": ", ".join(iterations_until_90(lines)),
                "strongest on own key": "" if signed else _mean(lines, "on key"),
                "difference of queries": _mean(lines, "difference", digits=2),
                "parameters": f"{lines[0]['parameters']:,}",
                "multiply-adds": f"{lines[0]['multiply-adds'] / 1e6:.1f} M",
            }
        )
    return _markdown(cells)


def _width_table(results: Sequence[dict]) -> str:
    cells: dict[str, dict[str, str]] = {}
    for row in TABLES["widths"]:
        name, width = row.name.rsplit(", ", 1)
        cells.setdefault(name, {"": name})[width] = _mean(
            _lines(row.digest(), results), "locks AP50"
        )
    return _markdown(list(cells.values()))


def _guess_table(results: Sequence[dict]) -> str:
    names = dict.fromkeys(line["row"] for line in results if line["row"].startswith("knows"))
    return _markdown(
        [{"": name, "locks AP50": _mean(_lines(name, results), "locks AP50")} for name in names]
    )


def _lines(digest: str, results: Sequence[dict]) -> list[dict]:
    return [line for line in results if line["digest"] == digest]


def _mean(lines: Sequence[dict], metric: str, digits: int = 1) -> str:
    """Return mean and standard deviation of a metric, or "" if the runs do not have it."""
    values = [line[metric] for line in lines if metric in line]
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _markdown(cells: list[dict[str, str]]) -> str:
    return tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True)
