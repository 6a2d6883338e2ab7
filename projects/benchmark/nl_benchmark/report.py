"""Result files, and the tables made from them."""

import json
import re
from importlib.metadata import distributions
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate

from nl_detectron.engine import environment
from nl_detectron.files import write_atomically

from .competitors import FLOOR
from .timing import paired_ratio

BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"


def circumstances(command: str, device: str) -> dict[str, Any]:
    """Return the command, the machine and the versions, which a result file begins with."""
    cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    machine = torch.cuda.get_device_name() if device == "cuda" else cpu
    versions = {d.name: d.version for d in distributions() if d.name in ("mmcv-lite", "timm")}
    result = {"command": command, "machine": machine, "environment": environment() | versions}
    return result | {"threads": torch.get_num_threads()}


def save(results: dict[str, Any], path: Path) -> None:
    """Write results as JSON, one row per line."""
    text = json.dumps(results).replace('{"facts"', '\n{"facts"')
    with write_atomically(str(path), "w") as file:
        file.write(text + "\n")


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
    with write_atomically(str(readme), "w") as file:
        file.write("\n\n".join([before + BEGIN.strip(), *parts, END + after]))


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a line per comparison and pass, and a column per competitor.

    The first competitor gets its median time and peak memory; the others get ratios to these. The
    last column is the time of the matrix products alone, by torch.mm, over the time of ours.
    """
    lines = []
    for facts, group in groupby(rows, key=lambda row: {**row["facts"], "pass": row["pass"]}):
        compared = list(group)
        by_name = {row["competitor"]: row for row in compared}
        floor = by_name.pop(FLOOR, {"failure": ""})
        cells = {name: _cell(row, compared[0]) for name, row in by_name.items()}
        ours = by_name.get("nl_detectron", {"failure": ""})
        if "failure" not in ours | floor:
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
