"""``metrics.json``, one JSON object a line, to which every run in a folder appends."""

import json
import shutil
from pathlib import Path


def truncate_metrics(path: Path, iteration: int) -> None:
    """Drop the lines of iterations that are about to be run (again), so that each stands once.

    They come from a run that was stopped after its last checkpoint, or that is started afresh in
    the same folder. If there are any, the file as it was is kept as ``metrics.json.bak``. The file
    is changed in place, as a writer may already have opened it to append.

    Args:
        path: metrics.json; need not exist.
        iteration: the first one, from 0, that will be run.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _iteration(line) < iteration]
    if kept != lines:
        shutil.copy(path, path.with_name(f"{path.name}.bak"))
        path.write_text("".join(kept))


def _iteration(line: str) -> float:
    try:
        return json.loads(line)["iteration"]
    except json.JSONDecodeError:  # the process was killed while it wrote this line
        return float("inf")
