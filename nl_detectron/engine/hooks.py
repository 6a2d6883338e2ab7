"""What the trainer logs and checks at each step, and what it writes about its environment."""

import json
import math
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from torch import Tensor, nn

from .. import __version__
from ..config import config_hash
from ..files import write_atomically
from ..layers import NonLocalBlock

PERIOD = 20  # iterations between two values in metrics.json, as in DefaultTrainer


def _is_logged(trainer: TrainerBase) -> bool:
    step = trainer.iter + 1
    return step % PERIOD == 0 or step == trainer.max_iter


class NonLocalNorms(HookBase):
    """Log two L2 norms of each non-local block.

    ``nonlocal/<name>/out_norm`` is the norm of the parameter that starts at zero: the scale of the
    norm layer after W_z, or W_z itself. If it stays near zero, the block contributes nothing.

    ``nonlocal/<name>/grad_norm`` is the norm of the gradient of all parameters of the block, as the
    optimizer used it: the mean over the processes, without AMP's scale, and after
    SOLVER.CLIP_GRADIENTS.
    """

    def __init__(self, model: nn.Module):
        self._blocks = {
            name.removeprefix("module."): module  # DistributedDataParallel's prefix
            for name, module in model.named_modules()
            if isinstance(module, NonLocalBlock)
        }

    def after_step(self) -> None:
        if not _is_logged(self.trainer):
            return
        for name, block in self._blocks.items():
            starts_at_zero = block.out if block.out.norm is None else block.out.norm
            self._log(f"{name}/out_norm", [starts_at_zero.weight.detach()])
            gradients = [p.grad for p in block.parameters() if p.grad is not None]
            self._log(f"{name}/grad_norm", gradients)

    def _log(self, name: str, tensors: list[Tensor]) -> None:
        norm = math.hypot(*(tensor.norm().item() for tensor in tensors))
        self.trainer.storage.put_scalar(f"nonlocal/{name}", norm, smoothing_hint=False)


class LossGuard(HookBase):
    """Stop training before a step with a gradient that is not finite, and name the images.

    detectron2 itself stops at a loss that is not finite. With SOLVER.AMP, GradScaler skips steps
    with infinite gradients and lowers its scale, so that this check does not see them.
    """

    def before_train(self) -> None:
        self._handles = [
            self.trainer.model.register_forward_pre_hook(self._keep_batch),
            self.trainer.optimizer.register_step_pre_hook(self._check_gradients),
        ]

    def after_train(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def name_batch(self) -> Iterator[None]:
        """Add the iteration and the images to a FloatingPointError in the body, a training step."""
        try:
            yield
        except FloatingPointError as error:
            images = ", ".join(image["file_name"] for image in self._batch)
            problem = " ".join(str(error).split()).rstrip(".")
            raise FloatingPointError(
                f"iteration {self.trainer.iter}: {problem}. Images of the batch: {images}. The "
                "step was not taken, and the checkpoints are from before it. Check these images "
                "and their annotations; if they are good, lower SOLVER.BASE_LR or set "
                "SOLVER.CLIP_GRADIENTS.ENABLED True"
            ) from error

    def _keep_batch(self, model: nn.Module, inputs: tuple[list[dict]]) -> None:
        if model.training:
            self._batch = inputs[0]

    def _check_gradients(self, optimizer: torch.optim.Optimizer, *_) -> None:
        gradients = {
            name: parameter.grad
            for name, parameter in self.trainer.model.named_parameters()
            if parameter.grad is not None
        }
        # A norm is finite only if all elements are, and on a CPU it is much faster than isfinite().
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients.values()])
        if not norms.isfinite().all():
            bad = [name for name, norm in zip(gradients, norms) if not norm.isfinite()]
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise FloatingPointError(f"the gradient of {bad[0]}{more} is not finite")


def log_max_memory(trainer: TrainerBase) -> None:
    """Log ``max_memory`` in MiB: allocated by torch on the GPU, or of the process on a CPU."""
    if not _is_logged(trainer):
        return
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    trainer.storage.put_scalar("max_memory", memory, smoothing_hint=False)


def write_environment(cfg: CfgNode) -> None:
    """Write ``environment.json``, which tells how to reproduce a training, to OUTPUT_DIR.

    Args:
        cfg: the trainer's, scaled to the number of processes.
    """
    content = environment()
    content.update(iterations=cfg.SOLVER.MAX_ITER, config_hash=config_hash(cfg), seed=cfg.SEED)
    with write_atomically(os.path.join(cfg.OUTPUT_DIR, "environment.json"), "w") as file:
        json.dump(content, file, indent=1)


def environment() -> dict:
    """Return the device, the number of processes, and the versions of this process."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores",
        "processes": comm.get_world_size(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "nl_detectron": __version__,
        "commit": _commit(),
    }


def _commit() -> Optional[str]:
    """Return the commit of this clone, followed by "+" if tracked files have been changed."""
    clone = Path(__file__).resolve().parents[2]
    if not (clone / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True).stdout.strip()
