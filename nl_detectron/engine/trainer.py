"""The trainer: detectron2's DefaultTrainer with evaluators, exact resuming and our hooks."""

import json
import os
import shutil
import weakref
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.engine.defaults import DefaultTrainer, create_ddp_model
from detectron2.engine.hooks import EvalHook, HookBase
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluators, SemSegEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from ..checkpoint import AuditedCheckpointer
from ..config import config_hash
from ..data.train_loader import ImageLoader, TrainLoader
from ..errors import UserError
from ..files import write_atomically
from ..modeling import build_model, build_optimizer
from .checks import check_datasets
from .hooks import NonLocalMetrics, check_gradients, environment
from .signals import StopOnSignal


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with our model, optimizer, data loaders, checkpointer and hooks."""

    build_model = staticmethod(build_model)
    build_optimizer = staticmethod(build_optimizer)
    check_datasets = staticmethod(check_datasets)
    mapper_class = DatasetMapper

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)  # DefaultTrainer.__init__ has its own checkpointer and DDP
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        optimizer.register_step_pre_hook(lambda *_: check_gradients(model))
        data_loader = self.build_train_loader(cfg)

        device_ids = [comm.get_local_rank()] if cfg.MODEL.DEVICE.startswith("cuda") else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer_class(model=model, data_loader=data_loader, optimizer=optimizer)

        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        state = {"trainer": weakref.proxy(self)}
        if "state_dict" not in vars(DefaultTrainer):  # release 0.5; main includes _trainer's state
            state["_trainer"] = self._trainer
        self.checkpointer = self.build_checkpointer(cfg, model, **state)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        hooks = super().build_hooks()
        # Stop between the checkpoint and the evaluation, which may take long.
        evaluation_index = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        hooks.insert(evaluation_index, StopOnSignal())
        return [NonLocalMetrics(self.model), *hooks]  # before those that write metrics

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        iterations = comm.all_gather(self.start_iter)
        if len(set(iterations)) > 1:
            problem = f"--resume: the processes would start from the iterations {iterations}"
            raise UserError(f"{problem}; OUTPUT_DIR must be a folder that all machines share")

    def train(self) -> dict | None:
        if comm.is_main_process():
            truncate_metrics(Path(self.cfg.OUTPUT_DIR, "metrics.json"), self.start_iter)
            content = {**environment(), "iterations": self.max_iter, "seed": self.cfg.SEED}
            content["config_hash"] = config_hash(self.cfg)  # scaled to the number of processes
            with write_atomically(f"{self.cfg.OUTPUT_DIR}/environment.json", "w") as file:
                json.dump(content, file, indent=1)
        self.data_loader.start_iter = self.start_iter
        return super().train()

    def run_step(self) -> None:
        try:
            super().run_step()
        except FloatingPointError as error:
            problem = " ".join(str(error).split()).rstrip(".")
            images = ", ".join(image["file_name"] for image in self.data_loader.batch)
            raise FloatingPointError(
                f"iteration {self.iter}: {problem}. Images of the batch: {images}. The step was "
                "not taken, and the checkpoints are from before it. Check these images and "
                "annotations, lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True"
            ) from error

    def after_train(self) -> None:
        if self.iter < self.max_iter:  # EvalHook would evaluate if the last step has failed
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, EvalHook)]
        super().after_train()

    @classmethod
    def build_checkpointer(cls, cfg: CfgNode, model: nn.Module, **state) -> AuditedCheckpointer:
        partial = cfg.MODEL.WEIGHTS_PARTIAL
        return AuditedCheckpointer(model, cfg.OUTPUT_DIR, partial=partial, **state)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return TrainLoader(cfg, cls.mapper_class(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> ImageLoader:
        pairs = {"mapper": lambda dataset_dict: (dataset_dict, None)}  # as ImageLoader takes them
        items = build_detection_test_loader(cfg, dataset_name, num_workers=0, **pairs)
        mapper = cls.mapper_class(cfg, is_train=False)
        return ImageLoader(mapper, items, num_workers=cfg.DATALOADER.NUM_WORKERS)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluators:
        from .coco_evaluator import FasterCOCOEvaluator

        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:  # or their files would have the same names
            folder = os.path.join(folder, dataset_name)
        options = {"max_dets_per_image": cfg.TEST.DETECTIONS_PER_IMAGE}
        options["kpt_oks_sigmas"] = cfg.TEST.KEYPOINT_OKS_SIGMAS
        evaluators = [FasterCOCOEvaluator(dataset_name, output_dir=folder, **options)]
        if MetadataCatalog.get(dataset_name).evaluator_type == "coco_panoptic_seg":
            for kind in (SemSegEvaluator, COCOPanopticEvaluator):
                evaluators.append(kind(dataset_name, output_dir=folder))
        return DatasetEvaluators(evaluators)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list | None = None) -> dict:
        """Evaluate and, if TEST.AUG.ENABLED, evaluate again with test-time augmentation (_TTA)."""
        results = super().test(cfg, model, evaluators)
        if cfg.TEST.AUG.ENABLED and evaluators is None:
            folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
            evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
            augmented = super().test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
            results.update({f"{name}_TTA": value for name, value in augmented.items()})
        return results


def truncate_metrics(path: Path, iteration: int) -> None:
    """Remove the lines of ``iteration`` and later ones, which training is about to write again.

    They are from a run that was killed, or is repeated. The old file is kept as metrics.json.bak.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut off the last one
    kept = [line for line in whole if json.loads(line)["iteration"] < iteration]
    if kept != lines:
        shutil.copy(path, path.with_name(f"{path.name}.bak"))
        path.write_text("".join(kept))  # in place, because a writer may have opened it to append
