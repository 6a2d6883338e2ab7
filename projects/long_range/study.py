#!/usr/bin/env python
"""Run the rows that results.jsonl does not have, and write the tables of the Markdown files."""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import long_range  # noqa: F401 - registers the backbones and the datasets
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from long_range.report import read_results, write_tables
from long_range.scores import guess, scores
from pycocotools.coco import COCO
from tqdm import tqdm

from nl_detectron.config import config_hash
from nl_detectron.engine import forward_signals, load_config
from nl_detectron.errors import exit_on_user_error
from nl_detectron.evaluation.coco_results import read_annotations
from nl_detectron.evaluation.runs import read_metrics, read_run

PROJECT = Path(__file__).resolve().parent
RESULTS = PROJECT / "results.jsonl"
WARM_UPS = ["R18_warm_up", "R50_warm_up"]  # the rows that the others start from
ROWS = [path.stem for path in sorted(PROJECT.glob("configs/*.yaml"))]
ROWS = WARM_UPS + [row for row in ROWS if row not in (*WARM_UPS, "faster_rcnn_hard")]


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report-only", action="store_true", help="do not train")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW")
    parser.add_argument("--seeds", type=int, default=3, help="runs per row (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("output/long_range"), metavar="DIR")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="for all rows")
    args = parser.parse_args(argv)
    if args.opts and args.results == RESULTS:
        parser.error("--opts needs --results, because other options give other results")

    failures = []
    if not args.report_only:
        with exit_on_user_error():
            failures = run_rows(args.rows, args.seeds, args.output, args.results, args.opts)
    for name in ("README.md", "RESULTS.md") if args.results == RESULTS else ():
        write_tables(read_results(RESULTS), PROJECT / name)
    if failures:
        sys.exit("\n".join(["failed runs:", *failures]))


def run_rows(
    rows: Sequence[str], seeds: int, output: Path, results_file: Path, opts: Sequence[str] = ()
) -> list[str]:
    """Run rows with the seeds 1 to ``seeds``, append a line for each run, and return the failures.

    Runs that are in the results are skipped, except those whose weights another run starts from
    and which are not in ``output``. An interrupted run is resumed.
    """
    results = read_results(results_file)
    if "chance" not in results:
        annotations = _annotations("nl_synthetic_hard_val")
        for row, seed in itertools.product(("chance", "colours"), range(5)):
            guessed = scores(annotations, guess(annotations, row, seed))
            _append(results_file, {"row": row, "seed": seed, **guessed})

    todo = []
    for seed in range(1, seeds + 1):
        missing = {row for row in rows if seed not in results.get(row, {})}
        starts = {_start(row) for row in missing}
        missing |= {row for row in starts if not _weights(output, row, seed).is_file()}
        todo += [(row, seed) for row in ROWS if row in missing]

    failures = []
    for row, seed in (progress := tqdm(todo, unit="run")):
        progress.set_description(f"{row}, seed {seed}")
        config_file, folder = str(PROJECT / f"configs/{row}.yaml"), output / row / f"seed{seed}"
        run_opts = [*opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
        if row != _start(row):
            run_opts += ["MODEL.WEIGHTS", str(_weights(output, _start(row), seed))]
        cfg = load_config(config_file, opts)
        seconds_before = sum(os.times()[2:4])  # of child processes, on all cores
        status = _train(["--config-file", config_file, *run_opts])
        seconds = sum(os.times()[2:4]) - seconds_before
        if status:
            failures.append(f"{folder}: exit status {status}; see log.txt there")
        elif seed not in results.get(row, {}):
            line = {"row": row, "seed": seed, **_read_run(folder, cfg), "core seconds": seconds}
            _append(results_file, line)
    return failures


def _start(row: str) -> str:
    """Return the row whose final weights, of the same seed, a row starts from."""
    return f"{'R50' if row.startswith('R50') else 'R18'}_warm_up"


def _weights(output: Path, row: str, seed: int) -> Path:
    return output / row / f"seed{seed}" / "model_final.pth"


def _train(arguments: list[str]) -> int:
    command = [sys.executable, str(PROJECT / "train_net.py"), "--resume", *arguments]
    children = []
    with forward_signals(lambda: children):  # on SIGTERM and Ctrl-C it writes a checkpoint
        children.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        return children[0].wait()


def _read_run(folder: Path, cfg: CfgNode) -> dict[str, Any]:
    detections = json.loads((folder / "inference/coco_instances_results.json").read_text())
    norms = {}  # of each block, at the end
    for line in read_metrics(folder):
        norms.update({key: line[key] for key in line if key.endswith("/out_norm")})
    return {
        "iterations": cfg.SOLVER.MAX_ITER,
        **scores(_annotations(cfg.DATASETS.TEST[0]), detections),
        "norm": sum(norm**2 for norm in norms.values()) ** 0.5 if norms else None,
        "config": config_hash(cfg),
        "commit": read_run(folder).environment["commit"],
    }


def _append(results_file: Path, line: dict) -> None:
    rounded = json.loads(json.dumps(line), parse_float=lambda text: float(f"{float(text):.5g}"))
    with open(results_file, "a") as file:
        file.write(json.dumps(rounded) + "\n")


def _annotations(dataset: str) -> COCO:
    DatasetCatalog.get(dataset)  # generates the dataset if necessary
    return read_annotations(MetadataCatalog.get(dataset).json_file)


if __name__ == "__main__":
    main()
