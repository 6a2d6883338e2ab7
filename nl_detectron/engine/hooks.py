"""Metrics of non-local blocks, a check of gradients, and the environment of a training."""

import logging
import math
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import detectron2
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from .. import __version__
from ..layers import affinity, named_blocks

PERIOD = 20  # iterations between two values in metrics.json, as in DefaultTrainer
QUERIES = 8  # random positions whose attention is compared
NEAR_IDENTITY = 0.01  # a block that changes its input by less contributes next to nothing


class NonLocalMetrics(HookBase):
    """Metrics that show whether the non-local blocks learn, with a warning at the end if not.

    - ``nonlocal/<name>/out_norm``: L2 norm of W_z or, with a norm, of its scale; starts at zero.
    - ``nonlocal/<name>/grad_norm``: L2 norm of the gradient that the optimizer used.
    - ``nonlocal/<name>/change``: L2 norm of output - input, divided by the L2 norm of the input.
    - ``nonlocal/<name>/query_difference``: :func:`affinity.query_difference` of a few positions,
      if the block has an affinity matrix.
    """

    def __init__(self, model: nn.Module):
        model = getattr(model, "module", model)  # of DistributedDataParallel
        self._blocks = named_blocks(model)
        self._handles = []

    def before_step(self) -> None:
        step = self.trainer.iter + 1
        if step % PERIOD == 0 or step == self.trainer.max_iter:
            self._handles = [
                block.register_forward_hook(partial(self._compare, name))
                for name, block in self._blocks.items()
            ]

    @torch.no_grad()
    def _compare(self, name: str, block: nn.Module, inputs: tuple[Tensor], z: Tensor) -> None:
        (x,) = inputs
        if x.numel() == 0:  # no region of interest
            return
        self._log(name, "change", (z - x).float().norm() / x.float().norm())
        if hasattr(block, "affinity_matrix"):
            generator = torch.Generator().manual_seed(self.trainer.iter)
            queries = torch.randperm(x[0, 0].numel(), generator=generator)[:QUERIES].to(x.device)
            rows = block.affinity_matrix(x, queries)
            self._log(name, "query_difference", affinity.query_difference(rows))

    @torch.no_grad()
    def after_step(self) -> None:
        if not self._handles:
            return
        while self._handles:
            self._handles.pop().remove()
        for name, block in self._blocks.items():
            gradients = [p.grad.norm() for p in block.parameters() if p.grad is not None]
            self._log(name, "grad_norm", math.hypot(*gradients))
            out = getattr(block, "out", None)
            if isinstance(out, nn.Conv2d):
                starts_at_zero = getattr(out, "norm", None) or out
                self._log(name, "out_norm", starts_at_zero.weight.norm())

    def after_train(self) -> None:
        latest = self.trainer.storage.latest()
        for name in self._blocks if self.trainer.iter >= self.trainer.max_iter else ():
            change, _ = latest.get(f"nonlocal/{name}/change", (math.inf, None))
            if change < NEAR_IDENTITY:
                logging.getLogger(__name__).warning(
                    f"{name} is still near the identity: it changes its input by {change:.2%} "
                    "(L2 norm). Try SOLVER.OPTIMIZER ADAMW, MODEL.NONLOCAL.UNIT_NORM True or more "
                    "iterations; see docs/TRAINING_TIPS.md"
                )

    def _log(self, name: str, key: str, value: float | Tensor) -> None:
        storage = self.trainer.storage
        storage.put_scalar(f"nonlocal/{name}/{key}", float(value), smoothing_hint=False)


def check_gradients(model: nn.Module) -> None:
    """Raise a FloatingPointError if a gradient is not finite, before the optimizer uses it.

    detectron2 itself stops at a loss that is not finite. With SOLVER.AMP, GradScaler skips steps
    with infinite gradients and lowers its scale, so that this check does not see them.
    """
    # A norm is finite only if all elements are, and on a CPU it is much faster than isfinite().
    norms = {name: p.grad.norm() for name, p in model.named_parameters() if p.grad is not None}
    if not torch.stack(list(norms.values())).isfinite().all():
        name = next(name for name, norm in norms.items() if not norm.isfinite())
        raise FloatingPointError(f"the gradient of {name} is not finite")


def environment() -> dict:
    """Return the device, the number of processes, the versions, and the commit of this clone."""
    gpu, clone = torch.cuda.is_available(), Path(__file__).resolve().parents[2]
    commit = None
    if (clone / ".git").exists() and shutil.which("git"):
        command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        commit = subprocess.run(command, cwd=clone, capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores",
        "processes": comm.get_world_size(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "nl_detectron": __version__,
        "commit": commit,
    }
