"""The trainer: detectron2's default one, with evaluation, and an eye on the non-local blocks."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Optional

import detectron2.utils.comm as comm
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn

from ..checkpoint import AuditedCheckpointer, LoadError
from .errors import UserError, as_user_error
from .evaluators import build_evaluator
from .hooks import NonLocalNorms
from .metrics import forget_iterations_from
from .record import RunRecord


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with the evaluator that each dataset's metadata ask for."""

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        # Of the same things as DefaultTrainer's, which its hooks go on saving with.
        self.checkpointer = AuditedCheckpointer(
            self.model,
            cfg.OUTPUT_DIR,
            partial=cfg.MODEL.WEIGHTS_PARTIAL,
            **self.checkpointer.checkpointables,
        )

    def resume_or_load(self, resume: bool = True) -> None:
        """As in DefaultTrainer, and audit what was loaded.

        Raises:
            UserError: the weights do not fit, and MODEL.WEIGHTS_PARTIAL is not set.
        """
        with as_user_error(LoadError):
            super().resume_or_load(resume)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """
        Raises:
            UserError: a key of MODEL.NONLOCAL has a bad value.
        """
        try:
            return super().build_model(cfg)
        except ValueError as error:
            if not str(error).startswith("MODEL.NONLOCAL"):
                raise
            raise UserError(str(error)) from error

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
    ) -> DatasetEvaluator:
        """Predictions go to ``output_folder``, by default ``OUTPUT_DIR/inference``."""
        folder = output_folder or f"{cfg.OUTPUT_DIR}/inference"
        return build_evaluator(dataset_name, folder, cfg.TEST.KEYPOINT_OKS_SIGMAS)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Optional[list[DatasetEvaluator]] = None
    ) -> OrderedDict:
        """As in DefaultTrainer; with TEST.AUG.ENABLED, again with test-time augmentation.

        The results of the latter have ``_TTA`` after their names.
        """
        results = super().test(cfg, model, evaluators)
        if cfg.TEST.AUG.ENABLED and evaluators is None:
            folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
            evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
            augmented = super().test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
            results.update({f"{name}_TTA": value for name, value in augmented.items()})
        return results

    def build_hooks(self) -> list[HookBase]:
        """Ours come first, for their values to be there when DefaultTrainer's hooks write."""
        return [NonLocalNorms(self.model), RunRecord(self.cfg), *super().build_hooks()]

    def train(self) -> Optional[OrderedDict]:
        if comm.is_main_process():
            forget_iterations_from(Path(self.cfg.OUTPUT_DIR, "metrics.json"), self.start_iter)
        return super().train()
