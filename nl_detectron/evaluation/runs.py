"""Read the output folder of a training run."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Optional, Union

from detectron2.config import CfgNode, get_cfg

from ..config import add_nonlocal_config
from ..errors import UserError


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    cfg: CfgNode
    metrics: dict[str, float]  # the final evaluation: "bbox/AP", "segm/AP50", "bbox/AP-person", ...
    seconds_per_iteration: float  # median over the run
    max_memory: float  # MiB, the maximum over the run
    environment: dict[str, Any]  # contents of environment.json: device, commit, versions, ...


def load_run_config(folder: Union[str, Path]) -> CfgNode:
    """Read the config of a run, finished or not.

    Raises:
        UserError: if the folder has no config.yaml.
    """
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(str(_existing(folder, "config.yaml")))
    return cfg


def read_environment(folder: Union[str, Path]) -> dict[str, Any]:
    """Read environment.json, which the trainer writes when training starts.

    Raises:
        UserError: if the folder has no environment.json.
    """
    return json.loads(_existing(folder, "environment.json").read_text())


def read_metrics(folder: Union[str, Path], tail: int = 0) -> list[dict[str, float]]:
    """Read the lines of metrics.json, or only the last ``tail`` of them; empty if no such file.

    Lines that a crash cut off are left out.
    """
    path = Path(folder, "metrics.json")
    lines = []
    for line in path.read_text().splitlines()[-tail:] if path.exists() else []:
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def final_metrics(folder: Union[str, Path]) -> Optional[dict[str, float]]:
    """Return the evaluation after the last iteration, or None if the run is not finished."""
    if not Path(folder, "environment.json").is_file():
        return None
    last = read_environment(folder)["iterations"] - 1
    for line in reversed(read_metrics(folder)):
        if line["iteration"] >= last and any(key.endswith("/AP") for key in line):
            return line
    return None


def read_run(folder: Union[str, Path]) -> Run:
    """Read a finished run.

    Raises:
        UserError: if the folder has no run, or the run is not finished.
    """
    cfg, environment = load_run_config(folder), read_environment(folder)
    metrics = final_metrics(folder)
    if metrics is None:
        raise UserError(f"{Path(folder, 'metrics.json')} has no final evaluation: not finished")
    lines = read_metrics(folder)
    return Run(
        cfg=cfg,
        metrics=metrics,
        seconds_per_iteration=median(line["time"] for line in lines if "time" in line),
        max_memory=max(line["max_memory"] for line in lines if "max_memory" in line),
        environment=environment,
    )


def _existing(folder: Union[str, Path], name: str) -> Path:
    path = Path(folder, name)
    if not path.is_file():
        raise UserError(f"no run in {folder}: {name} is missing")
    return path
