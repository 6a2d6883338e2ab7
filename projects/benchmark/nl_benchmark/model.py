"""Whole Mask R-CNNs: the baseline, and the same weights with non-local blocks inserted."""

import copy
from contextlib import nullcontext
from functools import cached_property
from typing import Dict, List, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ...config import get_config_file
from ...engine import load_config
from ...modeling import insert_nonlocal
from .. import detector_multiply_adds, meta_model
from .rounds import Call, Case

CONFIG = "COCO-InstanceSegmentation/mask_rcnn_{}_FPN_1x.yaml"

# The paper's places. It tells those of 5 and 10 blocks for R50: every other residual block of res3
# and res4, and every one. The deeper ones get as many, 2 + 3 and 4 + 6, evenly spread; 5 blocks in
# R101 as in the authors' released code.
ONE = ("res4.-2",)
PLACES = {
    "R_50": {1: ONE, 5: ("res3.1::2", "res4.1::2"), 10: ("res3.*", "res4.*")},
    "R_101": {1: ONE, 5: ("res3.1::2", "res4.6::7"), 10: ("res3.*", "res4.2::4")},
    "X_152_32x8d": {1: ONE, 5: ("res3.3::4", "res4.11::12"), 10: ("res3.1::2", "res4.5::6")},
}
OBJECTS = 10  # per training image, about COCO's mean of 7


def model_config(model: str, device: str) -> CfgNode:
    """The shipped config of a baseline; ``model`` is one of ``PLACES``."""
    return load_config(get_config_file(CONFIG.format(model)), ["MODEL.DEVICE", device])


def model_cases(
    name: str,
    cfg: CfgNode,
    dtype: torch.dtype,
    *,
    blocks: Sequence[int] = (1, 5, 10),
    subsamples: Sequence[str] = ("pool_conv", "conv_pool", "none"),
    batch: int = 1,
    height: int = 800,
    width: int = 1344,
) -> List[Case]:
    """The baseline, then a case for each number of blocks and each way of sub-sampling.

    Args:
        name: of the model, one of ``PLACES``.
        cfg: of its baseline; the device is the config's.
        dtype: lower than float32 is automatic mixed precision.
        batch: random images of that height and width, with random boxes and masks in training.
    """
    detectors = _Detectors(cfg, dtype, batch, height, width)
    rows = {"baseline": None}
    for subsample in subsamples:
        for count in blocks:
            rows[f"+{count} NL, {subsample}"] = (PLACES[name][count], subsample)

    cases = []
    for competitor, block in rows.items():
        with torch.device("meta"):
            meta = meta_model(cfg)
            if block:
                insert_nonlocal(meta, block[0], subsample=block[1])
        facts = {
            "model": name,
            "batch": batch,
            "parameters": sum(p.numel() for p in meta.parameters()),
            "GMAC": round(sum(detector_multiply_adds(meta, height, width).values()) / 1e9, 2),
        }
        # Weights and buffers, and the momentum of those that are trained.
        tensors = [*meta.parameters(), *meta.buffers()]
        tensors += [p for p in meta.parameters() if p.requires_grad]
        standing = sum(t.numel() * t.element_size() for t in tensors)
        cases.append(Case(competitor, facts, lambda block=block: detectors.passes(block), standing))
    return cases


class _Detectors:
    """One baseline, and copies of it that have blocks and share all of its weights.

    A new block is the identity, and with a learning rate of 0 it stays so: every model finds the
    same boxes, and has the same work to do beside its blocks.
    """

    def __init__(self, cfg: CfgNode, dtype: torch.dtype, batch: int, height: int, width: int):
        self._cfg = cfg
        self._device = cfg.MODEL.DEVICE
        self._dtype = dtype
        torch.manual_seed(0)
        self._images = [_image(cfg, height, width) for _ in range(batch)]

    @cached_property
    def _baseline(self) -> nn.Module:
        torch.manual_seed(0)
        model = build_model(self._cfg)
        _tame(model)
        return model

    @cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(_trained(self._baseline), lr=0.0, momentum=0.9)

    def passes(self, block: tuple | None) -> Dict[str, Call]:
        """
        Args:
            block: where, and how it sub-samples; None is the baseline.
        """
        model = self._baseline
        if block:
            shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
            model = copy.deepcopy(model, shared)
            insert_nonlocal(model, block[0], subsample=block[1])
            new = [p for p in _trained(model) if id(p) not in shared]
            self._optimizer.add_param_group({"params": new})
        optimizer = self._optimizer

        def precision():
            if self._dtype == torch.float32:
                return nullcontext()
            return torch.autocast(self._device, self._dtype)

        def inference() -> List[Tensor]:
            if model.training:
                model.eval()
            with torch.no_grad(), precision():
                found = [output["instances"] for output in model(self._images)]
            return [torch.cat([instances.pred_boxes.tensor for instances in found])]

        def training_step() -> List[Tensor]:
            if not model.training:
                model.train()
            torch.manual_seed(0)  # the same boxes are sampled in every model
            with EventStorage(), precision():
                loss = sum(model(self._images).values())
            loss.backward()
            optimizer.step()  # of the weights that have a gradient: this model's
            optimizer.zero_grad()
            return [loss.detach()]

        return {"inference": inference, "training step": training_step}


def _trained(model: nn.Module) -> List[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def _tame(model: nn.Module) -> None:
    """Scale random weights so that values stay of the order of 1, and there is full work to do.

    Nothing normalises an untrained model whose batch norm is frozen. And of a random classifier's
    80 scores none would reach the threshold, so that no box would get a mask: here every box is
    found to be of the first class.
    """
    model.backbone.bottom_up.stem.conv1.norm.weight.fill_(0.01)
    for module in model.modules():
        if isinstance(module, BottleneckBlock):
            module.conv3.norm.weight.fill_(0.1)
    model.roi_heads.box_predictor.cls_score.bias[0] = 5.0


def _image(cfg: CfgNode, height: int, width: int) -> Dict:
    """An image of noise, with random boxes from an eighth to half of its sides."""
    device = cfg.MODEL.DEVICE
    sides = torch.tensor([width, height])
    size = sides * (1 / 8 + 3 / 8 * torch.rand(OBJECTS, 2))
    corner = (sides - size) * torch.rand(OBJECTS, 2)
    boxes = torch.cat([corner, corner + size], dim=1)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.randint(cfg.MODEL.ROI_HEADS.NUM_CLASSES, (OBJECTS,))
    corners = [[x0, y0, x1, y0, x1, y1, x0, y1] for x0, y0, x1, y1 in boxes.tolist()]
    instances.gt_masks = PolygonMasks([[polygon] for polygon in corners])
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return {"image": image.to(device), "instances": instances.to(device)}
