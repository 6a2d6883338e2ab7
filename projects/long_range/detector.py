#!/usr/bin/env python
"""Train Mask R-CNN on the data of the demo, with a block from scratch or inserted.

A started run is resumed, and a finished one is not repeated. The schedule is the same for all rows.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from long_range.report import DETECTOR_ROWS, DETECTORS, RESULTS, read_results, write_tables

from nl_detectron.data.synthetic import KEYS, LOCKS
from nl_detectron.engine import load_config
from nl_detectron.errors import exit_on_user_error
from nl_detectron.evaluation import read_run
from nl_detectron.evaluation.runner import Job, run_jobs

BASELINE, NONLOCAL = (f"Synthetic/mask_rcnn_R_18_FPN{block}.yaml" for block in ("", "_NL"))
# The default block, in place of the recommended setting that the config has.
SGD = "SOLVER.OPTIMIZER SGD SOLVER.BASE_LR 0.02 SOLVER.WEIGHT_DECAY 0.0001".split()
SGD += ["MODEL.NONLOCAL.UNIT_NORM", "False"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    rows = list(DETECTOR_ROWS)
    add("--rows", nargs="+", choices=rows, default=rows, help="default: all; baseline comes first")
    add("--seeds", type=int, default=5, help="number of seeds, from 1")
    add("--output", type=Path, default=Path("output/detector"), help="folder of the runs")
    add("--results", type=Path, default=DETECTORS, help="file with one line per run")
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for all configs")
    args = parser.parse_args(argv)
    with exit_on_user_error():
        todo = list(jobs(args.rows, args.seeds, args.output, args.opts))
        if failures := run_jobs(todo):
            sys.exit("\n".join(failures))
        lines = [summarize(job.folder) for job in todo]
    args.results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if args.results == DETECTORS:
        write_tables(read_results(RESULTS))


def jobs(rows: Sequence[str], seeds: int, output: Path, opts: Sequence[str]) -> Iterator[Job]:
    """Yield the runs; those that insert a block start from the baseline of the same seed."""
    for seed in map(str, range(1, seeds + 1)):
        trained = ["MODEL.WEIGHTS", str(output / "baseline" / f"seed{seed}" / "model_final.pth")]
        for row in rows:
            folder, changes = output / row / f"seed{seed}", list(opts)
            if "inserted" in row:
                changes = [*trained, *changes]
            if "sgd" in row:
                changes = [*SGD, *changes]
            config = BASELINE if row == "baseline" else NONLOCAL
            command = [sys.executable, "-m", "nl_detectron.engine", "--resume", "--config-file"]
            command += [config, *changes, "SEED", seed, "OUTPUT_DIR", str(folder)]
            yield Job(folder, load_config(config, changes), command)


def summarize(folder: Path) -> dict[str, str | int | float]:
    """Return the line of a finished run; APs are in percent."""
    metrics = read_run(folder).metrics
    line = {"row": folder.parent.name, "seed": int(folder.name.removeprefix("seed"))}
    for title, classes in (("keys AP", KEYS), ("locks AP", LOCKS)):
        line[title] = round(mean(metrics[f"bbox/AP-{name}"] for name in classes), 2)
    return line | {"mask AP": round(metrics["segm/AP"], 2)}


if __name__ == "__main__":
    main()
