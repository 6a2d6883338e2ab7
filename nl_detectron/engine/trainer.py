"""The trainer: detectron2's default one, with evaluation, and an eye on the non-local blocks."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Optional

import detectron2.utils.comm as comm
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..checkpoint import AuditedCheckpointer
from ..data.train_loader import ErrorNamingMapper, TrainLoader, ignore_signals
from ..modeling import build_model, build_optimizer
from .distributed import check_same_start, ddp_on
from .evaluators import build_evaluator
from .hooks import NonLocalNorms
from .loss_guard import LossGuard
from .metrics import truncate_metrics
from .record import RunRecord
from .stop_on_signal import StopOnSignal


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with the evaluator that each dataset's metadata ask for."""

    def __init__(self, cfg: CfgNode):
        with ddp_on(cfg.MODEL.DEVICE):
            super().__init__(cfg)

    def resume_or_load(self, resume: bool = True) -> None:
        """As in DefaultTrainer, and audit what was loaded.

        Raises:
            UserError: the weights do not fit, and MODEL.WEIGHTS_PARTIAL is not set; or not every
                process finds the same checkpoint.
        """
        super().resume_or_load(resume)
        check_same_start(self.start_iter)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """
        Raises:
            UserError: a key of MODEL.NONLOCAL has a bad value, or some IN_FEATURES name what the
                backbone does not give.
        """
        return build_model(cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """The same batches at every call. An image that cannot be used is named."""
        return TrainLoader(cfg, ErrorNamingMapper(DatasetMapper(cfg, is_train=True)))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """As in DefaultTrainer, but an image that cannot be used is named."""
        mapper = ErrorNamingMapper(DatasetMapper(cfg, is_train=False))
        loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        loader.worker_init_fn = ignore_signals
        return loader

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """
        Raises:
            UserError: one of the keys for the blocks has a bad value.
        """
        return build_optimizer(cfg, model)

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
        """Ours come first, for their values to be there when DefaultTrainer's hooks write.

        A signal is looked for between the checkpoint and the evaluation, which may take long.
        """
        # In the place of DefaultTrainer's, of the same things, before its hooks take it to save.
        self.checkpointer = AuditedCheckpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            partial=self.cfg.MODEL.WEIGHTS_PARTIAL,
            **self.checkpointer.checkpointables,
        )
        hooks = super().build_hooks()
        evaluation = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        hooks.insert(evaluation, StopOnSignal())
        self._loss_guard = LossGuard()
        return [NonLocalNorms(self.model), RunRecord(self.cfg), self._loss_guard, *hooks]

    def train(self) -> Optional[OrderedDict]:
        if comm.is_main_process():
            truncate_metrics(Path(self.cfg.OUTPUT_DIR, "metrics.json"), self.start_iter)
        self.data_loader.start_iter = self.start_iter
        return super().train()

    def run_step(self) -> None:
        """
        Raises:
            FloatingPointError: the loss or a gradient is not finite. The step was not taken.
        """
        with self._loss_guard.explained():
            super().run_step()

    def after_train(self) -> None:
        if self.iter < self.max_iter:  # EvalHook takes a last step that failed for the end
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, EvalHook)]
        super().after_train()
