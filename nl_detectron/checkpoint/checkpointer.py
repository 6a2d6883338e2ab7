"""A ``DetectionCheckpointer`` that verifies what it loads and saves atomically."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, ContextManager, Optional

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from ..files import write_atomically
from .load_audit import audit
from .reading import LoadError, ReadError, read_checkpoint


class _AtomicPathManager:
    """detectron2's path manager, but files are written with :func:`write_atomically`."""

    def open(self, path: str, mode: str) -> ContextManager[IO]:
        return write_atomically(path, mode) if "w" in mode else PathManager.open(path, mode)

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)


class AuditedCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that never runs code from a file and never loads weights silently.

    The :func:`audit` of each loaded file is logged. If it finds problems, a LoadError is raised or,
    with ``partial``, only the tensors that fit are loaded. Files are saved atomically.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, partial: bool = False, **checkpointables: Any
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.path_manager = _AtomicPathManager()
        self._partial = partial

    def load(self, path: str, checkpointables: Optional[Sequence[str]] = None) -> dict:
        """Load a checkpoint as DetectionCheckpointer does, or raise a LoadError."""
        if not path:
            return super().load(path)
        self._path = path
        try:
            file = self.path_manager.get_local_path(path)
        except OSError as error:
            raise ReadError(f"{path} cannot be downloaded ({error})") from error
        if not os.path.isfile(file):
            raise ReadError(f"there is no file {os.path.abspath(file)}")

        content = super().load(file, checkpointables=[])
        for key in self.checkpointables if checkpointables is None else checkpointables:
            try:
                self.checkpointables[key].load_state_dict(content.pop(key))
            except (KeyError, ValueError) as error:
                raise LoadError(
                    f"{path} cannot be resumed: its {key!r} is missing or does not fit: {error!r}. "
                    "Use its SOLVER keys and its version of detectron2, or load it as MODEL.WEIGHTS"
                ) from error
        return content

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Resume or load; an error on resuming names the latest complete checkpoint."""
        try:
            return super().resume_or_load(path, resume=resume)
        except ReadError as error:
            files = self.get_all_checkpoint_files() if resume and self.has_checkpoint() else []
            for file in sorted(files, key=os.path.getmtime, reverse=True):
                with suppress(ReadError):
                    read_checkpoint(file)
                    raise LoadError(
                        f"{error}; the latest complete checkpoint is {file}: to resume from it, "
                        f"write its name into {self.save_dir}/last_checkpoint"
                    ) from error
            raise

    def _load_file(self, filename: str) -> dict:
        return read_checkpoint(filename)

    def _load_model(self, checkpoint: dict) -> Any:
        # load_state_dict does not report all missing keys: FrozenBN fills in statistics. The hook
        # sees the state dict that the model gets, after detectron2 has renamed its keys.
        loaded = {}
        hook = self.model._register_load_state_dict_pre_hook(lambda state, *_: loaded.update(state))
        try:
            incompatible = super()._load_model(checkpoint)
        except RuntimeError as error:  # a module rejects its tensors
            raise LoadError(f"{self._path}: {' '.join(str(error).split())}") from error
        finally:
            hook.remove()
        shapes = {name: tuple(tensor.shape) for name, tensor in loaded.items()}
        shapes.update({name: shape for name, shape, _ in incompatible.incorrect_shapes})
        line, problems = audit(self.model, shapes, caffe2=checkpoint.get("__author__") == "Caffe2")
        if problems and not self._partial:
            raise LoadError(
                f"{self._path} does not fit the model: {'; '.join(problems)}. To load only the "
                "tensors that fit, set MODEL.WEIGHTS_PARTIAL True"
            )
        logging.getLogger(__name__).info(line)
        return incompatible
