"""Train and evaluate the rows of a table, one after the other, each in its own process."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from tqdm import tqdm

from ..config import config_hash
from ..engine import forward_signals, load_config
from ..errors import UserError
from .runs import final_metrics, read_environment, read_metrics
from .tables import Table

POLL_PERIOD = 5.0  # seconds between two readings of the metrics of a run


@dataclass(frozen=True)
class Job:
    """A training of one row with one seed."""

    folder: Path
    cfg: CfgNode  # without SEED and OUTPUT_DIR, and not yet scaled to the number of GPUs
    command: list[str]  # trains and evaluates, or resumes

    def iteration(self) -> int:
        """Return the number of finished iterations, according to metrics.json."""
        lines = read_metrics(self.folder)
        return int(lines[-1]["iteration"]) + 1 if lines else 0


def jobs(table: Table, output: Path, rows=(), seeds=1, num_gpus=1, opts=()) -> list[Job]:
    """List the runs of a table: all rows, or ``rows``, with seed 1, then with seed 2, and so on.

    A run writes to ``output/<config>/seed<n>``, and uses ``num_gpus`` GPUs of this machine.
    ``opts`` are ``KEY VALUE ...`` for every config.
    """
    rows = rows or list(table.rows)
    if unknown := [row for row in rows if row not in table.rows]:
        raise UserError(f"--rows: no row {unknown[0]}; the rows are {', '.join(table.rows)}")
    cfgs = {row: load_config(table.config(row), opts) for row in rows}
    todo = []
    for seed in range(1, seeds + 1):
        for row in rows:
            folder = output / table.config(row).removesuffix(".yaml") / f"seed{seed}"
            command = [sys.executable, "-m", "nl_detectron.engine", "--resume"]
            command += ["--config-file", table.config(row), "--num-gpus", str(num_gpus)]
            command += [*opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
            todo.append(Job(folder, cfgs[row], command))
    return todo


def run_jobs(todo: Sequence[Job]) -> list[str]:
    """Run or resume the jobs that are not finished, and return one line for each failed run.

    The output of a run goes to output.log in its folder; its progress is shown on stderr. On
    SIGTERM or Ctrl-C, the current run writes a checkpoint, then this process exits.
    """
    failures = []
    for number, job in enumerate(todo, start=1):
        title = f"[{number}/{len(todo)}] {job.folder.parent.name}, {job.folder.name}"
        if not _has_same_config(job):
            problem = "this run has another config: give the same options, or another --output"
            failures.append(f"{job.folder}: {problem}")
        elif final_metrics(job.folder):
            print(f"{title}: already finished", file=sys.stderr)
        elif status := _run_job(job, title):
            failures.append(f"{job.folder}: exit status {status}; see output.log in this folder")
    return failures


def _has_same_config(job: Job) -> bool:
    """Return False if the folder has a run with other options."""
    if not (environment := read_environment(job.folder)):
        return True
    cfg = DefaultTrainer.auto_scale_workers(job.cfg, environment["processes"])
    return config_hash(cfg) == environment["config_hash"]


def _run_job(job: Job, title: str) -> int:
    job.folder.mkdir(parents=True, exist_ok=True)
    log = job.folder / "output.log"
    print(f"{title}: full output in {log}", file=sys.stderr)
    children = []
    period = 0.1 if sys.stderr.isatty() else 60  # seconds between two updates of the line
    # smoothing=0: the remaining time is computed from the mean speed.
    bar = tqdm(desc=title, initial=job.iteration(), mininterval=period, miniters=0, smoothing=0)
    with open(log, "a") as file, forward_signals(lambda: children), bar:
        print(shlex.join(job.command), file=file, flush=True)
        child = subprocess.Popen(job.command, stdout=file, stderr=subprocess.STDOUT)
        children.append(child)
        while child.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                child.wait(POLL_PERIOD)
            bar.total = read_environment(job.folder).get("iterations")
            iteration = min(job.iteration(), bar.total or 0)
            bar.initial = min(bar.initial, iteration)  # the last checkpoint may be older
            bar.update(iteration - bar.n)
    return child.returncode
