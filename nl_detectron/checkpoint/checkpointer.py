"""A checkpointer that says what it loaded, and refuses weights that do not fit."""

import logging

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .load_audit import STATISTICS, audit


class LoadError(ValueError):
    """A file of weights does not fit the model."""


class AuditedCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` with an :func:`audit` of each file that it loads."""

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
        self._path = ""

    def load(self, path: str, *args, **kwargs) -> dict:
        """As in DetectionCheckpointer; an empty path loads nothing, and there is no audit.

        Raises:
            LoadError: the audit found problems; the message names the file and lists them.
        """
        self._path = path
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint: dict):
        # The keys reported as missing are not enough: FrozenBN fills in statistics that a file does
        # not have, and reports nothing. The hook sees what the model is given, already renamed.
        shapes = {}

        def note(state_dict, *_):
            shapes.update({name: tuple(tensor.shape) for name, tensor in state_dict.items()})

        hook = self.model._register_load_state_dict_pre_hook(note)
        incompatible = super()._load_model(checkpoint)
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
