"""Top-1 and top-5 accuracy of video classification."""

import json
import logging
import os
from collections import OrderedDict
from typing import Optional

import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate

from nl_detectron.files import write_atomically


class VideoEvaluator(DatasetEvaluator):
    """Evaluate the scores of videos, of which each process has another part.

    The result is ``{"video": ...}`` with "top1", "top5" and "mean_class" (the mean of the classes'
    top-1) in percent, and "cross_entropy". The top-1 of each class is logged, and written with the
    scores of each video to ``video_results.json``.
    """

    def __init__(self, dataset_name: str, output_folder: Optional[str] = None):
        self._classes = MetadataCatalog.get(dataset_name).get("classes")
        self._output_folder = output_folder
        self.reset()

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
        top1 = {
            label: 100 * (rank[labels == label] == 1).double().mean().item()
            for label in labels.unique().tolist()
        }
        metrics = {
            "top1": 100 * (rank == 1).double().mean().item(),
            "top5": 100 * (rank <= 5).double().mean().item(),
            "mean_class": sum(top1.values()) / len(top1),
            "cross_entropy": F.nll_loss(scores.log(), labels).item(),
        }
        per_class = {self._name(label): value for label, value in top1.items()}
        table = tabulate(per_class.items(), ["class", "top-1"], floatfmt=".1f")
        logging.getLogger("nl_detectron.video").info(f"{len(results)} videos\n{table}")
        if self._output_folder:
            os.makedirs(self._output_folder, exist_ok=True)
            path = os.path.join(self._output_folder, "video_results.json")
            videos = [{"video_id": i, "label": k, "scores": s.tolist()} for i, k, s in results]
            with write_atomically(path, "w") as file:
                json.dump({"per_class": per_class, "videos": videos}, file)
        return OrderedDict(video=metrics)

    def _name(self, label: int) -> str:
        return self._classes[label] if self._classes else str(label)
