"""A checkpointer that says what it loaded, refuses what does not fit, and saves whole files."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..files import PARTIAL, SaveError, write_atomically
from .load_audit import STATISTICS, audit
from .reading import LoadError, harmless_globals, read_checkpoint


class AuditedCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that distrusts files.

    Each file that it loads gets an :func:`audit`, and none can run code (see :func:`read_file`). A
    checkpoint has its name, and is named in ``last_checkpoint``, only once it is whole on disk.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, partial: bool = False, **checkpointables
    ):
        """
        Args:
            model: a detector; may be wrapped for distributed training.
            save_dir: the folder of the checkpoints.
            partial: load what fits, whatever the audit says.
            checkpointables: what else to load and save, as in DetectionCheckpointer.
        """
        super().__init__(model, save_dir, **checkpointables)
        self._partial = partial
        self._path, self._parts = "", ()

    def load(self, path: str, checkpointables: Optional[Sequence[str]] = None) -> dict:
        """As in DetectionCheckpointer; an empty path loads nothing, and there is no audit.

        Raises:
            LoadError: the file cannot be used, as :func:`read_checkpoint` says, or the audit found
                problems, or a part beside the model is not in it, or does not fit; the message
                names the file and what it is.
        """
        self._path = path
        self._parts = self.checkpointables if checkpointables is None else checkpointables
        try:
            return super().load(path, checkpointables=checkpointables)
        except KeyError as error:
            if not self._parts:
                raise
            raise self._lacks(error.args[0]) from error  # in the trainer's part of another release
        except ValueError as error:
            if isinstance(error, LoadError):
                raise
            # That of a part beside the model: an optimizer with other groups of parameters.
            raise LoadError(f"{path} does not fit this run, by its SOLVER keys: {error}") from error

    def save(self, name: str, **kwargs: Any) -> None:
        """As in DetectionCheckpointer.

        Raises:
            SaveError: the file could not be written. Those before it are as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: part.state_dict() for key, part in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        for left in Path(self.save_dir).glob(f"*.pth{PARTIAL}"):
            left.unlink()  # by a process that was killed
        try:
            with write_atomically(path, "wb") as file:
                torch.save(data, file)
            self.tag_last_checkpoint(os.path.basename(path))
        except SaveError as error:
            last = self.get_checkpoint_file()
            stays = f"--resume goes on from {last}" if last else "there is no checkpoint yet"
            raise SaveError(f"{error}; {stays}") from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """As in DetectionCheckpointer."""
        with write_atomically(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def _load_file(self, filename: str) -> dict:
        read_checkpoint(filename)  # detectron2, which reads it in its own way, would run its code
        with harmless_globals():
            return super()._load_file(filename)

    def _lacks(self, key: str) -> LoadError:
        return LoadError(
            f"{self._path} has no {key!r}, which going on with a training needs: another version "
            "of detectron2 wrote it, or it is of weights alone. As MODEL.WEIGHTS of a new training "
            "it can be used"
        )

    def _load_model(self, checkpoint: dict):
        for key in self._parts:
            if key not in checkpoint:  # fvcore would go on without a word
                raise self._lacks(key)
        # The keys reported as missing are not enough: FrozenBN fills in statistics that a file does
        # not have, and reports nothing. The hook sees what the model is given, already renamed.
        shapes = {}

        def note(state_dict, *_):
            shapes.update({name: tuple(tensor.shape) for name, tensor in state_dict.items()})

        hook = self.model._register_load_state_dict_pre_hook(note)
        try:
            incompatible = super()._load_model(checkpoint)
        except RuntimeError as error:  # one of the model's modules refused its part
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
                f"{self._path} does not fit the model: {'; '.join(problems)}. To load what fits "
                "all the same, and leave the rest as initialized, set MODEL.WEIGHTS_PARTIAL True"
            )
        logging.getLogger(__name__).info(line)
        return incompatible
