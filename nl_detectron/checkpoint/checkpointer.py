"""A ``DetectionCheckpointer`` that verifies what it loads and saves atomically."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..files import PARTIAL, SaveError, write_atomically
from .load_audit import STATISTICS, audit
from .reading import LoadError, ReadError, read_checkpoint

HEURISTICS = "?matching_heuristics=True"  # suffix of a path that detectron2 0.6 and later accept


class AuditedCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that never runs code from a file and never loads weights silently.

    Every loaded file gets an :func:`audit`, which is logged or, if it finds problems, raised.
    Checkpoints and ``last_checkpoint`` are written with :func:`write_atomically`.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, partial: bool = False, **checkpointables: Any
    ):
        """
        Args:
            partial: load the tensors that fit even if the audit finds problems.
            model, save_dir, checkpointables: as in DetectionCheckpointer.
        """
        super().__init__(model, save_dir, **checkpointables)
        self._partial = partial
        self._path = ""  # the argument of load()

    def load(self, path: str, checkpointables: Optional[Sequence[str]] = None) -> dict:
        """Load a checkpoint as DetectionCheckpointer does; an empty path loads nothing.

        Raises:
            LoadError: the file is missing or damaged, would run code, has NaN values, or does not
                fit the model or a checkpointable.
        """
        if not path:
            return super().load(path)
        self._path = path
        name = path.removesuffix(HEURISTICS)
        try:
            file = self.path_manager.get_local_path(name)
        except OSError as error:
            raise ReadError(f"{path} cannot be downloaded ({error})") from error
        if not os.path.isfile(file):
            raise ReadError(f"there is no file {os.path.abspath(file)}")

        content = super().load(file, checkpointables=[])
        for key in self.checkpointables if checkpointables is None else checkpointables:
            self.logger.info(f"Loading {key} from {path} ...")
            try:
                self.checkpointables[key].load_state_dict(content.pop(key))
            except (KeyError, ValueError) as error:
                raise LoadError(
                    f"{path} cannot be resumed: its {key!r} is missing or does not fit "
                    f"({type(error).__name__}: {error}). Use the SOLVER keys and the version of "
                    "detectron2 that wrote it, or start a new training with MODEL.WEIGHTS set to it"
                ) from error
        return content

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Load the last checkpoint if there is one and ``resume`` is True, else load ``path``.

        Raises:
            LoadError: as in :meth:`load`. If the last checkpoint is unreadable, the message names
                the latest complete one. The user decides whether to resume from that.
        """
        try:
            return super().resume_or_load(path, resume=resume)
        except ReadError as error:
            if not resume or not self.has_checkpoint():
                raise
            raise ReadError(f"{error}; {self._describe_latest_complete()}") from error

    def _describe_latest_complete(self) -> str:
        files = self.get_all_checkpoint_files()
        for file in sorted(files, key=os.path.getmtime, reverse=True):
            with suppress(ReadError):
                read_checkpoint(file)
                return (
                    f"the latest complete checkpoint is {file}: to resume from it, write its name, "
                    f"{os.path.basename(file)}, into {self.save_dir}/last_checkpoint"
                )
        return f"there is no complete checkpoint in {self.save_dir}"

    def save(self, name: str, **kwargs: Any) -> None:
        """Save a checkpoint as DetectionCheckpointer does, but atomically.

        Raises:
            SaveError: the file cannot be written. Earlier checkpoints are left as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        content.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        for file in Path(self.save_dir).glob(f"*.pth{PARTIAL}"):
            file.unlink()  # from a process that was killed
        try:
            with write_atomically(path, "wb") as file:
                torch.save(content, file)
            self.tag_last_checkpoint(os.path.basename(path))
        except SaveError as error:
            last = self.get_checkpoint_file()
            hint = f"--resume continues from {last}" if last else "there is no checkpoint yet"
            raise SaveError(f"{error}; {hint}") from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with write_atomically(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def _load_file(self, filename: str) -> dict:
        content = read_checkpoint(filename)
        if self._path.endswith(HEURISTICS):
            content["matching_heuristics"] = True
        return content

    def _load_model(self, checkpoint: dict) -> Any:
        # The missing keys that load_state_dict reports are not enough: FrozenBN fills in statistics
        # that the file lacks. The hook sees the state dict that the model gets, already renamed.
        shapes = {}

        def collect_shapes(state_dict: dict, *_: Any) -> None:
            shapes.update({name: tuple(tensor.shape) for name, tensor in state_dict.items()})

        hook = self.model._register_load_state_dict_pre_hook(collect_shapes)
        try:
            incompatible = super()._load_model(checkpoint)
        except RuntimeError as error:  # a module rejects its tensors
            raise LoadError(f"{self._path}: {' '.join(str(error).split())}") from error
        finally:
            hook.remove()
        shapes.update({name: shape for name, shape, _ in incompatible.incorrect_shapes})

        # Files from Caffe2 may have running statistics folded into scale and bias.
        folded = checkpoint.get("__author__") == "Caffe2" and not any(
            name.endswith(STATISTICS) for name in shapes
        )
        line, problems = audit(self.model, shapes, folded=folded)
        if problems and not self._partial:
            raise LoadError(
                f"{self._path} does not fit the model: {'; '.join(problems)}. To load only the "
                "tensors that fit, set MODEL.WEIGHTS_PARTIAL True"
            )
        logging.getLogger(__name__).info(line)
        return incompatible
