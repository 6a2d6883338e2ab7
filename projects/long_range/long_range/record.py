"""What is kept of each run: a small JSON file, from which all tables and figures are made."""

import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..analysis import detector_multiply_adds, meta_model, roi_reach
from ..config import config_hash
from ..evaluation.runner import Job, Settings
from ..evaluation.runs import read_environment, read_metrics, read_run, scaled
from .scores import levels, read_annotations, scores

STATES = ("started", "failed", "finished")
CURVES = ("total_loss", "bbox/AP")
LEVELS = "levels.json"


def record_path(folder: Path, job: Job) -> Path:
    return folder / f"{job.row.name}_seed{job.seed}.json"


def read_records(folder: Path) -> List[dict]:
    """All records of a folder, in the order of their names."""
    paths = sorted(folder.glob("*_seed*.json"))
    return [json.loads(path.read_text()) for path in paths]


def write_record(
    folder: Path, job: Job, settings: Settings, state: str, seconds: Optional[float]
) -> None:
    """Write what there is of a run; of a finished one, its results.

    Args:
        folder: for the records.
        state: one of STATES.
        seconds: of a core, so far; None if that is not known.
    """
    record: Dict[str, Any] = {
        "row": job.row.name,
        "seed": job.seed,
        "state": state,
        "core_seconds": seconds,
        "start": job.row.start,
        "config_hash": hash_without_start(job, settings),
    }
    if state == "finished":
        record.update(_results(job))
    write_json(record_path(folder, job), record)


def hash_without_start(job: Job, settings: Settings) -> str:
    """Of a run's config; what it begins with is a path, and is recorded by its row's name."""
    cfg = scaled(job.config(settings), settings.num_gpus).clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""
    return config_hash(cfg)


def write_levels(folder: Path, cfg: CfgNode) -> None:
    """What chance and knowledge give on the test data of a config."""
    path = folder / LEVELS
    if not path.exists():
        write_json(path, levels(_test_annotations(cfg)))


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, with numbers to 6 digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(_rounded(value), indent=1) + "\n")
    os.replace(partial, path)


def _results(job: Job) -> dict:
    run = read_run(job.folder)
    lines = read_metrics(job.folder)
    model = meta_model(run.cfg)
    height, width = run.cfg.INPUT.MIN_SIZE_TEST, run.cfg.INPUT.MAX_SIZE_TEST
    detections = json.loads((job.folder / "inference/coco_instances_results.json").read_text())
    environment = read_environment(job.folder)
    return {
        "iterations": environment["iterations"],
        "seconds_per_iteration": run.seconds_per_iteration,
        "max_memory_mib": run.max_memory,
        "parameters": run.parameters,
        "multiply_adds": detector_multiply_adds(model, height, width)["backbone"],
        "reach": roi_reach(model.backbone),
        "metrics": {k: v for k, v in run.metrics.items() if k.startswith("bbox/")},
        **scores(_test_annotations(run.cfg), detections),
        "curves": {
            key: [[line["iteration"], line[key]] for line in lines if key in line] for key in CURVES
        },
        "out_norms": {  # the last of each block
            key.split("/")[1]: value
            for line in lines
            for key, value in line.items()
            if key.startswith("nonlocal/") and key.endswith("/out_norm")
        },
        "environment": {
            key: environment[key] for key in ("device", "torch", "detectron2", "commit")
        },
    }


def _test_annotations(cfg: CfgNode):
    (name,) = cfg.DATASETS.TEST
    DatasetCatalog.get(name)  # it may have to be generated
    return read_annotations(MetadataCatalog.get(name).json_file)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
