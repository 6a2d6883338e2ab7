"""Train and evaluate the rows of a table, one after the other, each in its own process.

The state of a run is read from its folder. The runner can be killed at any time; when it is started
again, it skips finished runs and resumes the others.
"""

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from tabulate import tabulate

from ..config import config_hash, get_config_file
from ..engine import forward_signals, load_config
from ..errors import UserError
from .runs import final_metrics, read_environment, read_metrics
from .tables import Row, Table

LOG_TAIL = 10  # lines of a failed run's output that are printed
POLL_PERIOD = 2.0  # seconds between two looks at the metrics of a run
PRINT_PERIOD = 60.0  # seconds between two progress lines if stderr is not a terminal


@dataclass(frozen=True)
class Settings:
    """Settings of all runs.

    Attributes:
        output: folder of all runs; one run is in ``output/<config>/seed<n>``.
        seeds: number of runs per row, with the seeds 1 to ``seeds``.
        num_gpus: GPUs per run, on this machine.
        opts: ``KEY VALUE ...`` for every config.
    """

    output: Path
    seeds: int = 3
    num_gpus: int = 1
    opts: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """One run of one row, in ``folder``."""

    table: Table
    row: Row
    seed: int
    folder: Path

    def command(self, settings: Settings) -> list[str]:
        """Return the command that trains and evaluates, or resumes."""
        return [
            *(sys.executable, "-m", "nl_detectron.engine", "--resume"),
            *("--config-file", self.table.config(self.row)),
            *("--num-gpus", str(settings.num_gpus)),
            *settings.opts,
            *("SEED", str(self.seed), "OUTPUT_DIR", str(self.folder)),
        ]

    def config(self, settings: Settings) -> CfgNode:
        """Return the config that the command loads, except for seed and output folder."""
        return load_config(get_config_file(self.table.config(self.row)), settings.opts)

    def is_finished(self) -> bool:
        return final_metrics(self.folder) is not None

    def progress(self) -> str:
        """Describe how far training has come, such as "iteration 40 of 400, ETA 0:03:20"."""
        lines = read_metrics(self.folder, tail=2)
        if not lines or not (self.folder / "environment.json").is_file():
            return "starting"
        iteration = int(lines[-1]["iteration"]) + 1
        iterations = read_environment(self.folder)["iterations"]
        if iteration >= iterations:
            return "evaluating"
        eta = timedelta(seconds=round(lines[-1].get("eta_seconds", 0)))
        return f"iteration {iteration} of {iterations}, ETA {eta}"


def jobs(table: Table, rows: Sequence[str], settings: Settings) -> list[Job]:
    """List the runs of a table: all rows with the first seed, then with the next.

    Args:
        rows: names of rows; empty for all.

    Raises:
        UserError: if the table has no row of that name.
    """
    chosen = [table.row(name) for name in rows] or table.rows
    return [
        Job(table, row, seed, settings.output / table.folder(row) / f"seed{seed}")
        for seed in range(1, settings.seeds + 1)
        for row in chosen
    ]


def plan(todo: Sequence[Job], settings: Settings) -> str:
    """Format the state and the command of each run as a text table."""
    rows = []
    for job in todo:
        lines = read_metrics(job.folder, tail=2)
        state = f"at iteration {lines[-1]['iteration'] + 1:.0f}" if lines else "not begun"
        state = "finished" if job.is_finished() else state
        rows.append([job.row.name, job.seed, state, shlex.join(job.command(settings))])
    return tabulate(rows, ["row", "seed", "state", "command"])


def run_jobs(todo: Sequence[Job], settings: Settings) -> list[str]:
    """Run the jobs that are not finished, in order. A failed run does not stop the others.

    The output of a run goes to output.log in its folder; its progress is shown on stderr. On
    SIGTERM or Ctrl-C, the current run writes a checkpoint, then this process exits.

    Returns:
        One line for each failed run.

    Raises:
        UserError: if the options do not fit a config.
    """
    failures = []
    for number, job in enumerate(todo, start=1):
        line = _ProgressLine(f"[{number}/{len(todo)}] {job.row.name}, seed {job.seed}")
        problem = _config_mismatch(job, settings)
        if not problem and job.is_finished():
            line.end("already finished")
        elif not problem:
            problem = _run_job(job, settings, line)
        if problem:
            failures.append(f"{job.folder}: {problem}")
    return failures


def _run_job(job: Job, settings: Settings, line: "_ProgressLine") -> str:
    """Run one job; return why it failed, or an empty string."""
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {error}") from error
    log = job.folder / "output.log"
    print(f"{line.title}: full output in {log}", file=sys.stderr)
    command = job.command(settings)
    children = []
    with open(log, "a") as file, forward_signals(lambda: children):
        print(shlex.join(command), file=file, flush=True)
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        children.append(child)
        while True:
            try:
                status = child.wait(POLL_PERIOD)
                break
            except subprocess.TimeoutExpired:
                line.update(job.progress())
        line.end(f"exit status {status}" if status else "finished")
    if not status:
        return ""
    print(*log.read_text().splitlines()[-LOG_TAIL:], sep="\n", file=sys.stderr)
    return f"exit status {status}; see {log.name} in this folder"


def _config_mismatch(job: Job, settings: Settings) -> str:
    """Return why this run cannot be resumed, or an empty string."""
    cfg = job.config(settings)
    # config.yaml is not compared: a run that is killed while it starts leaves an incomplete one.
    if not (job.folder / "environment.json").is_file():
        return ""
    environment = read_environment(job.folder)
    scaled_cfg = DefaultTrainer.auto_scale_workers(cfg, environment["processes"])
    expected, found = config_hash(scaled_cfg), environment["config_hash"]
    if expected == found:
        return ""
    return (
        f"this run has another config (hash {found}, expected {expected}); give the same options "
        "as before, or another --output"
    )


class _ProgressLine:
    """A line on stderr, updated in place on a terminal, otherwise printed once a minute."""

    def __init__(self, title: str):
        self.title = title
        self._printed = time.monotonic()

    def update(self, text: str) -> None:
        if sys.stderr.isatty():
            line = f"{self.title}: {text}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._printed >= PRINT_PERIOD:
            self._printed = time.monotonic()
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def end(self, text: str) -> None:
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        print(f"{clear}{self.title}: {text}", file=sys.stderr, flush=True)
