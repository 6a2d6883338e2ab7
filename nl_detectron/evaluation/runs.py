"""Read the output folder of a training run."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from detectron2.config import CfgNode

from ..engine import load_config
from ..errors import UserError


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    cfg: CfgNode
    metrics: dict[str, float]  # the final evaluation: "bbox/AP", "segm/AP50", "bbox/AP-person", ...
    seconds_per_iteration: float  # median over the run; nan if it is shorter than 4 iterations


def read_run(folder: str | Path) -> Run:
    """Read a run; raise a UserError if the folder has none, or it is not finished."""
    cfg = load_run_config(folder)
    metrics = final_metrics(folder)
    if metrics is None:
        raise UserError(f"{Path(folder, 'metrics.json')} has no final evaluation: not finished")
    times = [line["time"] for line in read_metrics(folder) if "time" in line]
    return Run(cfg, metrics, median(times or [float("nan")]))


def load_run_config(folder: str | Path) -> CfgNode:
    """Read the config of a run, finished or not; raise a UserError if there is none."""
    path = Path(folder, "config.yaml")
    if not path.is_file():
        raise UserError(f"no run in {folder}: {path.name} is missing")
    return load_config(str(path))


def read_environment(folder: str | Path) -> dict:
    """Read environment.json, which the trainer writes when it starts; empty if no such file."""
    path = Path(folder, "environment.json")
    return json.loads(path.read_text()) if path.is_file() else {}


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """Read metrics.json, without lines that a crash cut off; empty if no such file."""
    path = Path(folder, "metrics.json")
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def final_metrics(folder: str | Path) -> dict[str, float] | None:
    """Return the evaluation after the last iteration, or None if the run is not finished."""
    iterations = read_environment(folder).get("iterations", float("inf"))
    for line in reversed(read_metrics(folder)):
        if line["iteration"] >= iterations - 1 and any(key.endswith("/AP") for key in line):
            return line
    return None
