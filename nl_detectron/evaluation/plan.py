"""What the runs of a table would cost."""

import shlex
import time
from dataclasses import dataclass
from typing import Optional, Sequence

import torch
from tabulate import tabulate
from torch import nn

from ..analysis import detector_multiply_adds, meta_model, saved_bytes
from .runner import Job, Settings
from .runs import read_metrics, scaled

TRAINING = 3  # a training step does about three times the multiply-adds of a forward pass
EFFICIENCY = 0.3  # of a large matrix product's rate that a whole training step reaches: a guess


@dataclass(frozen=True)
class Estimate:
    """Cost of one run.

    Attributes:
        hours: from the first to the last iteration.
        gib: memory of each process; if it was not measured, a lower bound, which leaves out what
            the heads keep for the backward pass.
        source: "measured" in steps of this very run or one of its row, or "multiply-adds".
    """

    hours: float
    gib: float
    source: str


def estimate(job: Job, settings: Settings, tflops: Optional[float] = None) -> Estimate:
    """Estimate one run from the steps that it or its row has done, else from multiply-adds.

    Steps are taken as they were; they say nothing of another number of GPUs.

    Args:
        tflops: what each GPU sustains in training; measured on this machine if not given.
    """
    cfg = scaled(job.config(settings), settings.num_gpus)
    steps = [
        line
        for folder in [job.folder, *sorted(job.folder.parent.glob("seed*"))]
        for line in read_metrics(folder)
        if "time" in line and "max_memory" in line
    ]
    if steps:
        hours = steps[-1]["time"] * cfg.SOLVER.MAX_ITER / 3600
        return Estimate(hours, steps[-1]["max_memory"] / 2**10, "measured")

    model = meta_model(cfg)
    height, width = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    forward = sum(detector_multiply_adds(model, height, width).values())
    images = cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.MAX_ITER
    rate = (tflops or EFFICIENCY * _matrix_tflops()) * 1e12 * settings.num_gpus
    seconds = 2 * TRAINING * forward * images / rate
    per_process = cfg.SOLVER.IMS_PER_BATCH / settings.num_gpus
    memory = _training_bytes(model, height, width, per_process)
    return Estimate(seconds / 3600, memory / 2**30, "multiply-adds")


def _training_bytes(model: nn.Module, height: int, width: int, images: float) -> float:
    """Weights, gradients and momentum, and what the backbone keeps for the backward pass."""
    step = max(model.backbone.size_divisibility, 1)
    sides = (-(-side // step) * step for side in (height, width))
    image = torch.zeros(1, 3, *sides, device="meta")
    state = sum(p.numel() * 4 * (3 if p.requires_grad else 1) for p in model.parameters())
    return state + images * saved_bytes(model.train().backbone, image)


def _matrix_tflops(seconds: float = 0.5) -> float:
    """Rate of float32 matrix products on this machine, in 1e12 floating-point operations/s."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(2048, 2048, device=device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        (a @ a)[0, 0].item()  # waits for the result
        count += 1
    return 2 * 2048**3 * count / (time.perf_counter() - start) / 1e12


def plan_table(todo: Sequence[Job], settings: Settings, tflops: Optional[float] = None) -> str:
    """One line per run, as text: its state, estimated cost, and command."""
    rows = []
    for job in todo:
        cost = estimate(job, settings, tflops)
        state = "finished" if job.is_finished() else "begun" if job.folder.exists() else "missing"
        memory = f"{cost.gib:.1f}" if cost.source == "measured" else f"> {cost.gib:.1f}"
        command = shlex.join(job.command(settings))
        rows.append([job.row.name, job.seed, state, cost.hours, memory, cost.source, command])
    headers = ["row", "seed", "state", "hours", "GiB per GPU", "estimated from", "command"]
    return tabulate(rows, headers, floatfmt=".2f")
