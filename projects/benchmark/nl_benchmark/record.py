"""A benchmark on disk: what was measured, on what machine, by what command."""

import csv
import importlib.metadata
import io
import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List

import torch

from ...engine.record import environment
from .rounds import Row

PACKAGES = ("torchvision", "mmcv-lite", "timm")  # beside those that environment() names


@dataclass(frozen=True)
class Record:
    """One run of the benchmark.

    Attributes:
        bench: "op", "block" or "model".
        command: that ran it.
        device: "cpu" or "cuda".
        dtype: such as "float32".
        rounds: of measurements.
        machine: facts about it, by name.
        versions: of packages, by name.
        comparisons: lists of rows, of which the first is the reference of its list.
    """

    bench: str
    command: str
    device: str
    dtype: str
    rounds: int
    machine: Dict[str, Any]
    versions: Dict[str, str]
    comparisons: List[List[Row]]


def machine(device: str) -> Dict[str, Any]:
    """The processor that the benchmark runs on, its threads, and its memory in GiB."""
    if device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        facts = {"processor": _cpu_name(), "threads": torch.get_num_threads()}
    else:
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory
        facts = {"processor": properties.name, "CUDA": torch.version.cuda}
    return {**facts, "GiB": round(memory / 2**30, 1), "system": platform.system()}


def versions() -> Dict[str, str]:
    """Of Python, the packages that are there, and the commit."""
    found = {"Python": platform.python_version()}
    names = ("torch", "detectron2", "nl_detectron", "commit")
    found.update({name: str(environment()[name]) for name in names})
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def save(record: Record, stem: Path) -> None:
    """Write ``stem``.json and ``stem``.csv."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(asdict(record), indent=1) + "\n", "utf-8")
    stem.with_suffix(".csv").write_text(as_csv(record), "utf-8")


def load(path: Path) -> Record:
    """Read a .json file that :func:`save` wrote.

    Raises:
        ValueError: it is not one; the message names the file.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        comparisons = [[Row(**row) for row in rows] for rows in values.pop("comparisons")]
        return Record(**values, comparisons=comparisons)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was not written by tools/benchmark.py: {error}") from error


def as_csv(record: Record) -> str:
    """One line per measured time, and one with none for what failed."""
    lines = []
    for row in [row for rows in record.comparisons for row in rows]:
        values = asdict(row)
        facts, seconds = values.pop("facts"), values.pop("seconds")
        for number, time in enumerate(seconds or [None], 1):
            lines.append({**facts, **values, "round": number, "seconds": time})
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _cpu_name() -> str:
    """What Linux calls it, else what Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    match = cpuinfo.exists() and re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
    return match[1] if match else platform.processor() or platform.machine()
