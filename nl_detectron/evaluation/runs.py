"""What a training run left in its output folder."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any, Dict, List, Sequence, Union

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer

from ..analysis import meta_model
from ..config import add_nonlocal_config


@dataclass(frozen=True)
class Run:
    """One finished training run.

    Attributes:
        cfg: its config.
        metrics: the last evaluation, as in metrics.json: "bbox/AP", "segm/AP50", "bbox/AP-person"
            and so on, in percent.
        seconds_per_iteration: the median over the whole run.
        max_memory: MiB; the largest of metrics.json.
        environment: what :class:`nl_detectron.engine.RunRecord` wrote of machine and versions.
    """

    cfg: CfgNode
    metrics: Dict[str, float]
    seconds_per_iteration: float
    max_memory: float
    environment: Dict[str, Any]

    def mean_ap(self, task: str, classes: Sequence[str]) -> float:
        """The mean AP, in percent, of some classes; ``task`` is "bbox" or "segm"."""
        return mean(self.metrics[f"{task}/AP-{name}"] for name in classes)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the model."""
        return sum(p.numel() for p in meta_model(self.cfg).parameters())


def load_run_config(folder: Union[str, Path]) -> CfgNode:
    """The config of a run, finished or not.

    Raises:
        FileNotFoundError: there is no config.yaml in the folder.
    """
    path = Path(folder, "config.yaml")
    if not path.is_file():
        raise FileNotFoundError(f"no run in {folder}: {path.name} is not there")
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


def scaled(cfg: CfgNode, processes: int) -> CfgNode:
    """The config as the trainer scales it to a number of processes, one per GPU."""
    return DefaultTrainer.auto_scale_workers(cfg, processes)


def read_environment(folder: Union[str, Path]) -> Dict[str, Any]:
    """What the run wrote, whole or not at all, when its training began.

    Raises:
        FileNotFoundError: it has not begun.
    """
    return json.loads(Path(folder, "environment.json").read_text())


def read_metrics(folder: Union[str, Path]) -> List[Dict[str, float]]:
    """The lines of metrics.json; empty if there is none. A line cut by a crash is left out."""
    path = Path(folder, "metrics.json")
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def read_run(folder: Union[str, Path]) -> Run:
    """Read a finished run back.

    Raises:
        FileNotFoundError: the folder has no config.yaml or environment.json.
        ValueError: metrics.json has no evaluation of the last iteration.
    """
    environment = read_environment(folder)
    last = environment["iterations"] - 1
    lines = read_metrics(folder)
    finals = [
        line for line in lines if line["iteration"] >= last and any(k.endswith("/AP") for k in line)
    ]
    if not finals:
        raise ValueError(f"{Path(folder, 'metrics.json')} has no final evaluation: not finished")
    return Run(
        cfg=load_run_config(folder),
        metrics=finals[-1],
        seconds_per_iteration=median(line["time"] for line in lines if "time" in line),
        max_memory=max(line["max_memory"] for line in lines if "max_memory" in line),
        environment=environment,
    )
