"""The trainer: nl_detectron's with clips, video metrics, and weights that are inflated."""

import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import Optional

import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine.hooks import HookBase, PreciseBN
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn
from torch.optim import AdamW, Optimizer

from nl_detectron.engine import Trainer
from nl_detectron.errors import OptionError
from nl_detectron.modeling import build_optimizer

from .data import build_test_loader, build_train_loader
from .evaluation import VideoEvaluator
from .weights import VideoCheckpointer


class VideoTrainer(Trainer):
    build_train_loader = staticmethod(build_train_loader)
    build_test_loader = staticmethod(build_test_loader)

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        self.checkpointer = VideoCheckpointer(
            self.model,
            cfg.OUTPUT_DIR,
            partial=cfg.MODEL.WEIGHTS_PARTIAL,
            **self.checkpointer.checkpointables,
        )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """Build the optimizer of SOLVER.OPTIMIZER, with the parameter groups of the SGD."""
        optimizer = build_optimizer(cfg, model)
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return optimizer
        if cfg.SOLVER.OPTIMIZER != "ADAMW":
            problem = f"is {cfg.SOLVER.OPTIMIZER!r}; valid: 'SGD' and 'ADAMW'"
            raise OptionError("SOLVER.OPTIMIZER", problem)
        keys = ("params", "lr", "weight_decay")
        groups = [{key: group[key] for key in keys} for group in optimizer.param_groups]
        return maybe_add_gradient_clipping(cfg, AdamW)(groups, lr=cfg.SOLVER.BASE_LR)

    def build_hooks(self) -> list[HookBase]:
        hooks = super().build_hooks()
        for hook in hooks:
            if isinstance(hook, PreciseBN) and not hook._disabled:
                hook._data_loader = RepeatedBatches(hook._data_loader, hook._num_iter)
        return hooks

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Optional[list] = None) -> OrderedDict:
        """Evaluate in all processes with the first one's statistics of BN, as in checkpoints."""
        if comm.get_world_size() > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: Optional[str] = None
    ) -> VideoEvaluator:
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return VideoEvaluator(dataset_name, folder)


class RepeatedBatches:
    """The first batches of a loader again and again.

    With it PreciseBN takes the same batches each time, so that a resumed training repeats the
    statistics of an uninterrupted one.
    """

    def __init__(self, loader, count: int):
        self.loader, self.count = loader, count

    def __iter__(self) -> Iterator[list[dict]]:
        while True:
            yield from itertools.islice(self.loader, self.count)
