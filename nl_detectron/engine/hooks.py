"""What the trainer logs and checks at each step, and its environment."""

import math
import os
import resource
import shutil
import subprocess
from pathlib import Path

import detectron2
import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from torch import nn

from .. import __version__
from ..layers import NonLocalBlock

PERIOD = 20  # iterations between two values in metrics.json, as in DefaultTrainer


class NonLocalNorms(HookBase):
    """Log two L2 norms of each non-local block.

    - ``nonlocal/<name>/out_norm``: of the parameter that starts at zero, the scale of the norm
      after W_z, or W_z itself. If it stays near zero, the block contributes nothing.
    - ``nonlocal/<name>/grad_norm``: of the gradient of all parameters, as the optimizer used it.
    """

    def __init__(self, model: nn.Module):
        self._blocks = {
            name.removeprefix("module."): module  # DistributedDataParallel's prefix
            for name, module in model.named_modules()
            if isinstance(module, NonLocalBlock)
        }

    def after_step(self) -> None:
        step, storage = self.trainer.iter + 1, self.trainer.storage
        if step % PERIOD and step != self.trainer.max_iter:
            return
        for name, block in self._blocks.items():
            starts_at_zero = block.out if block.out.norm is None else block.out.norm
            gradients = [p.grad for p in block.parameters() if p.grad is not None]
            norms = {"out_norm": [starts_at_zero.weight.detach()], "grad_norm": gradients}
            for key, tensors in norms.items():
                norm = math.hypot(*(tensor.norm().item() for tensor in tensors))
                storage.put_scalar(f"nonlocal/{name}/{key}", norm, smoothing_hint=False)


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


def log_max_memory(trainer: TrainerBase) -> None:
    """Log ``max_memory`` in MiB: allocated by torch on the GPU, or of the process on a CPU."""
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    trainer.storage.put_scalar("max_memory", memory, smoothing_hint=False)


def environment() -> dict:
    """Return the device, the number of processes, the versions, and the commit of this clone.

    "+" follows the commit if tracked files have been changed.
    """
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
