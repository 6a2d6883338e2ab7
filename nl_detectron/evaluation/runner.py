"""Runs the rows of a table, one after the other, each in a process of its own.

The state is on disk: a run is finished when its folder has a final evaluation, begun when it has
anything else. So the runner can be killed at any moment and called again.
"""

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import config_hash, get_config_file
from ..engine import forward_signals, load_config
from ..errors import UserError
from .runs import read_environment, read_run, scaled
from .tables import Row, Table


@dataclass(frozen=True)
class Settings:
    """What applies to every row.

    Attributes:
        output: runs are at ``output/<config>/seed<n>``, so tables that share a row share its runs.
        seeds: number of runs per row, with the seeds 1 to ``seeds``.
        num_gpus: of this machine, per run.
        opts: ``KEY VALUE ...`` for every config, such as other datasets.
    """

    output: Path
    seeds: int = 3
    num_gpus: int = 1
    opts: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """One run of one row."""

    table: Table
    row: Row
    seed: int
    folder: Path
    start: Optional[Path] = None  # the weights that it begins with

    @property
    def opts(self) -> List[str]:
        """``KEY VALUE ...`` of the row, and of what it begins with."""
        return [*self.row.opts, *(["MODEL.WEIGHTS", str(self.start)] if self.start else [])]

    def command(self, settings: Settings) -> List[str]:
        """The command that trains and evaluates, or goes on with it."""
        return [
            *(sys.executable, "-m", "nl_detectron.engine", "--resume"),
            *("--config-file", self.table.config(self.row)),
            *("--num-gpus", str(settings.num_gpus)),
            *self.opts,
            *settings.opts,
            *("SEED", str(self.seed), "OUTPUT_DIR", str(self.folder)),
        ]

    def config(self, settings: Settings) -> CfgNode:
        """The config that the command loads, but for the seed and the output folder."""
        file = get_config_file(self.table.config(self.row))
        return load_config(file, [*self.opts, *settings.opts])

    def is_finished(self) -> bool:
        try:
            read_run(self.folder)
        except (FileNotFoundError, ValueError):
            return False
        return True


def dataset_opts(train: str, test: str) -> List[str]:
    """The options by which any config uses other datasets, with their number of classes.

    Raises:
        UserError: a name is not registered with detectron2.
    """
    for name in (train, test):
        if name not in DatasetCatalog.list():
            raise UserError(f"--datasets: no dataset {name!r} is registered")
    DatasetCatalog.get(train)  # a COCO file's class names become known when it is loaded
    classes = str(len(MetadataCatalog.get(train).thing_classes))
    opts = ["DATASETS.TRAIN", str((train,)), "DATASETS.TEST", str((test,))]
    return [*opts, "MODEL.ROI_HEADS.NUM_CLASSES", classes, "MODEL.RETINANET.NUM_CLASSES", classes]


def jobs(table: Table, rows: Sequence[str], settings: Settings) -> Iterator[Job]:
    """The runs of a table: all rows with the first seed, then with the next.

    Args:
        rows: names; empty for all.

    Raises:
        UserError: the table has no row of that name.
    """
    try:
        chosen = [table.row(name) for name in rows] or table.rows
    except ValueError as error:
        raise UserError(f"--rows: {table.title!r} has {error}") from error
    for seed in range(1, settings.seeds + 1):
        for row in chosen:
            yield _job(table, row, seed, settings)


def _job(table: Table, row: Row, seed: int, settings: Settings) -> Job:
    folder = settings.output / table.folder(row) / f"seed{seed}"
    if row.start is None:
        return Job(table, row, seed, folder)
    start = _job(table, table.row(row.start), seed, settings)
    return Job(table, row, seed, folder, final_weights(start))


def final_weights(job: Job) -> Path:
    """What a finished run leaves, and others may begin with."""
    return job.folder / "model_final.pth"


def run_jobs(todo: Sequence[Job], settings: Settings) -> List[str]:
    """Run what is not finished, in order. A run that fails does not stop the others.

    SIGTERM and Ctrl-C end the run in progress, with a checkpoint, and then this process.

    Returns:
        One line for each run that failed.
    """
    failures = []
    for number, job in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] ", end="")
        problem = run_job(job, settings)
        if problem:
            failures.append(f"{job.folder}: {problem}")
    return failures


def run_job(job: Job, settings: Settings) -> str:
    """Run one, unless it is finished.

    Returns:
        Why it failed; empty if it did not.
    """
    problem = _made_otherwise(job, settings)
    if problem:
        return problem
    if job.is_finished():
        print(f"{job.folder}: finished already", flush=True)
        return ""
    command = job.command(settings)
    print(f"{job.folder}: {shlex.join(command)}", flush=True)
    status = _call(command)
    return f"exit status {status}; see log.txt in it" if status else ""


def _call(command: Sequence[str]) -> int:
    """As subprocess.call, but a signal is left to the command, which writes a checkpoint first.

    Then this process ends too, with the same exit status.
    """
    children = []
    with forward_signals(lambda: children):
        children.append(subprocess.Popen(command))
        return children[0].wait()


def _made_otherwise(job: Job, settings: Settings) -> str:
    """Why a folder cannot be gone on with; empty if it can, or is not there yet."""
    # Not by config.yaml, which a run that is killed while it starts leaves cut off.
    try:
        environment = read_environment(job.folder)
    except FileNotFoundError:
        return ""
    here = environment["config_hash"]
    wanted = config_hash(scaled(job.config(settings), environment["processes"]))
    if here == wanted:
        return ""
    return (
        f"was made with another config ({here}, and now it is {wanted}); give the options that it "
        "was made with, or another --output"
    )
