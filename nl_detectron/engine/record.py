"""What a run needs to be read back later: on what it ran, and how much memory it took."""

import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Optional

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..config import config_hash

PERIOD = 20  # iterations between two values, as DefaultTrainer's writers have


class RunRecord(HookBase):
    """Writes ``environment.json`` when training starts, and ``max_memory`` into the metrics.

    ``max_memory`` is in MiB: of the GPU by torch's allocator, or of the whole process on a CPU.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: the trainer's, scaled to the number of processes.
        """
        self._path = Path(cfg.OUTPUT_DIR, "environment.json")
        self._config_hash = config_hash(cfg)
        self._seed = cfg.SEED

    def before_train(self) -> None:
        if comm.is_main_process():
            partial = self._path.with_suffix(".tmp")
            record = environment()
            record.update(
                iterations=self.trainer.max_iter, config_hash=self._config_hash, seed=self._seed
            )
            partial.write_text(json.dumps(record, indent=1) + "\n")
            os.replace(partial, self._path)

    def after_step(self) -> None:
        step = self.trainer.iter + 1
        if step % PERIOD == 0 or step == self.trainer.max_iter:
            if torch.cuda.is_available():
                memory = torch.cuda.max_memory_allocated() / 2**20
            else:
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            self.trainer.storage.put_scalar("max_memory", memory, smoothing_hint=False)


def environment() -> dict:
    """Versions, device and commit of this process."""
    return {
        "device": _device(),
        "processes": comm.get_world_size(),
        "torch": torch.__version__,
        "detectron2": _version("detectron2") or detectron2.__version__,
        "nl_detectron": _version("nl_detectron"),
        "commit": _commit(),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"


def _version(distribution: str) -> Optional[str]:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> Optional[str]:
    """Of the clone that this file is in, with a "+" if tracked files were changed since."""
    if not _git("ls-files", Path(__file__).name):
        return None  # installed, perhaps below somebody else's clone
    return _git("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")


def _git(*arguments: str) -> Optional[str]:
    if shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return result.stdout.strip() if result.returncode == 0 else None
