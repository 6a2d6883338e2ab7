"""The trainer: nl_detectron's with clips, video metrics, and weights that are inflated."""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser  # noqa: F401 - for train_net.py
from detectron2.engine.hooks import PreciseBN
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor, nn

from nl_detectron.checkpoint import AuditedCheckpointer
from nl_detectron.checkpoint.conversion import convert, rename
from nl_detectron.checkpoint.reading import read_file
from nl_detectron.engine import Trainer
from nl_detectron.files import write_atomically

from .clips import ClipMapper
from .data import check_datasets
from .model import inflate_weight


class VideoCheckpointer(AuditedCheckpointer):
    """Convert released models, and inflate 2-D weights where the model convolves in time."""

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".pkl"):
            blobs = read_file(filename).get("blobs", {})
            if "res_conv1_bn_rm" in blobs:  # models of images have no statistics of BN
                return {"model": convert_released(blobs)}
        return super()._load_file(filename)

    def _load_model(self, checkpoint: dict) -> Any:
        weights = checkpoint["model"]
        for name, module in self.model.named_modules():
            for key in (f"{name}.weight", f"{name.removeprefix('backbone.')}.weight"):
                if getattr(module, "frames", 1) > 1 and key in weights and weights[key].ndim == 4:
                    weights[key] = inflate_weight(torch.as_tensor(weights[key]), module.frames)
        return super()._load_model(checkpoint)


def convert_released(blobs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert a model of video-nonlocal-net (Caffe2), of 32 or 8 frames, for POOLING released."""
    weights, left_out = convert(blobs, "caffe2")
    for name in left_out:
        if getattr(blobs[name], "ndim", 0) == 5:
            weights[rename(name, "caffe2")] = torch.as_tensor(blobs[name])
    weights = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    weights["classifier.weight"] = torch.as_tensor(blobs["pred_w"]).flatten(1)
    weights["classifier.bias"] = torch.as_tensor(blobs["pred_b"])
    return weights


class VideoEvaluator(DatasetEvaluator):
    """Evaluate the scores of videos, of which each process has another part.

    The result is ``{"video": ...}`` with "top1", "top5" and "error" (100 - top1) in percent, and
    "cross_entropy". ``video_results.json`` has each class's top-1 and each video's scores.
    """

    def __init__(self, cfg: CfgNode, dataset_name: str):
        self._classes = MetadataCatalog.get(dataset_name).get("classes")
        name = dataset_name.replace(os.sep, "_") if len(cfg.DATASETS.TEST) > 1 else ""
        self._output_folder = os.path.join(cfg.OUTPUT_DIR, "inference", name)

    def reset(self) -> None:
        self._results = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for video, output in zip(inputs, outputs):
            self._results.append((video["video_id"], video["label"], output["scores"].cpu()))

    def evaluate(self) -> Optional[OrderedDict]:
        results = [result for part in comm.gather(self._results) for result in part]
        if not comm.is_main_process():
            return None
        labels = torch.tensor([label for _, label, _ in results])
        scores = torch.stack([scores for _, _, scores in results]).double()
        # A class is ranked below all with the same score, so that equal scores are no success.
        rank = (scores >= scores.gather(1, labels[:, None])).sum(dim=1)
        top1 = 100 * (rank == 1).double()
        names = self._classes or range(scores.shape[1])
        per_class = {names[k]: top1[labels == k].mean().item() for k in labels.unique().tolist()}
        videos = [{"video_id": i, "label": k, "scores": s.tolist()} for i, k, s in results]
        os.makedirs(self._output_folder, exist_ok=True)
        with write_atomically(os.path.join(self._output_folder, "video_results.json"), "w") as file:
            json.dump({"per_class": per_class, "videos": videos}, file)
        entropy = F.nll_loss(scores.log(), labels).item()
        metrics = {"top1": top1.mean().item(), "top5": 100 * (rank <= 5).double().mean().item()}
        metrics |= {"error": 100 - metrics["top1"], "cross_entropy": entropy}
        return OrderedDict(video=metrics)


class VideoTrainer(Trainer):
    check_datasets = staticmethod(check_datasets)
    mapper_class = ClipMapper
    build_evaluator = VideoEvaluator

    def after_step(self) -> None:
        for hook in self._hooks:
            if isinstance(hook, PreciseBN):
                hook._data_iter = None  # take the same batches each time, so that resuming is exact
        super().after_step()

    @classmethod
    def build_checkpointer(cls, cfg: CfgNode, model: nn.Module, **state) -> AuditedCheckpointer:
        return VideoCheckpointer(model, cfg.OUTPUT_DIR, partial=cfg.MODEL.WEIGHTS_PARTIAL, **state)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Optional[list] = None) -> OrderedDict:
        """Evaluate in all processes with the first one's statistics of BN, as in checkpoints."""
        if comm.get_world_size() > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        return super().test(cfg, model, evaluators)
