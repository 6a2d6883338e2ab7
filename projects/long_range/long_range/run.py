"""Runs the study, and keeps a record of every run that was started."""

import fcntl
import json
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import List

from ..evaluation.runner import Job, Settings, final_weights, run_job
from .record import hash_without_start, record_path, write_levels, write_record

WAIT = 1.0  # seconds between two looks at runs that another process has locked


def run_study(todo: Sequence[Job], settings: Settings, records: Path) -> List[str]:
    """Run what is not recorded as finished, in order, each after what it begins with.

    Several processes can do so at once: each run is locked by one of them. What one was killed in
    the middle of, the next goes on with. A run that fails does not stop the others.

    Args:
        records: folder for the records.

    Returns:
        One line for each run that failed here.
    """
    if todo:
        write_levels(records, todo[0].config(settings))
    needed = {job.start for job in todo if not _is_recorded(job, records)}

    def is_done(job: Job) -> bool:
        """Recorded, and its weights, which no record has, are there if another needs them."""
        weights = final_weights(job)
        return _is_recorded(job, records) and (weights not in needed or weights.is_file())

    left = [job for job in todo if not is_done(job)]
    failures = [
        f"{record_path(records, job)}: was made with another config; give the options that it was "
        "made with, or another --records"
        for job in todo
        if _is_of_another_config(job, settings, records)
    ]
    if failures:
        return failures
    print(f"{len(todo) - len(left)} of {len(todo)} runs are finished already", flush=True)
    began, done = time.monotonic(), 0
    while left:
        runnable = [job for job in left if job.start is None or job.start.is_file()]
        for job in runnable:
            with _locked(job) as ours:
                if not ours:
                    continue
                left.remove(job)
                if is_done(job):  # by another process
                    break
                problem = _run_recorded(job, settings, records)
                done += 1
                eta = (time.monotonic() - began) / done * len(left) / 60
                print(f"{len(left)} runs to go, {eta:.0f} min if this process does all", flush=True)
                if problem:
                    failures.append(f"{job.folder}: {problem}")
                break
        else:
            left = [job for job in left if not is_done(job)]
            if not any(_is_locked(job) for job in todo) and not any(
                job.start is None or job.start.is_file() for job in left
            ):
                failures += [f"{job.folder}: {job.start} is not there" for job in left]
                break
            time.sleep(WAIT)
    return failures


def _run_recorded(job: Job, settings: Settings, records: Path) -> str:
    path = record_path(records, job)
    before = json.loads(path.read_text())["core_seconds"] if path.exists() else None
    before = before or 0.0
    write_record(records, job, settings, "started", before)
    began = _core_seconds()
    try:
        problem = run_job(job, settings)
    except SystemExit:  # by a signal; what was begun is gone on with another time
        write_record(records, job, settings, "started", before + _core_seconds() - began)
        raise
    spent = before + _core_seconds() - began
    write_record(records, job, settings, "failed", spent)  # until its results can be read
    if not problem:
        write_record(records, job, settings, "finished", spent)
    return problem


def _core_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _is_recorded(job: Job, records: Path) -> bool:
    path = record_path(records, job)
    return path.exists() and json.loads(path.read_text())["state"] == "finished"


def _is_of_another_config(job: Job, settings: Settings, records: Path) -> bool:
    path = record_path(records, job)
    if not path.exists():
        return False
    return json.loads(path.read_text())["config_hash"] != hash_without_start(job, settings)


@contextmanager
def _locked(job: Job) -> Iterator[bool]:
    """Whether this process has the run to itself, until the end of the body or of the process."""
    path = job.folder.with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _is_locked(job: Job) -> bool:
    with _locked(job) as ours:
        return not ours
