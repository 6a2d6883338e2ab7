"""Small detectors and their inputs."""

import torch
from detectron2.export.flatten import flatten_to_tuple
from detectron2.structures import Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from helpers import TINY, zoo_config
from torch import nn

from nl_detectron.engine import load_config

NONLOCAL = ("MODEL.BACKBONE.NAME", "build_nonlocal_backbone")
# Detectors of the zoo with few channels, which keep every detection of untrained weights.
SMALL = (
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.FPN.OUT_CHANNELS", 16),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16] * 8),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("TEST.DETECTIONS_PER_IMAGE", 10),
)


def tiny_config(*options):
    """Return the config of the smallest Mask R-CNN, with one block in res4."""
    return load_config(TINY, ["MODEL.DEVICE", "cpu", *options])


def small_config(*options, **kwargs):
    return zoo_config(*SMALL, *options, **kwargs)


def randomize(model):
    """Give all weights and statistics random values, so that no block or norm is the identity.

    The weights of convolutions are small, so that features and scores stay finite.
    """
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.startswith("pixel_") or not tensor.is_floating_point() or "anchor" in name:
            continue
        if tensor.dim() > 1:
            nn.init.normal_(tensor, std=0.3 * tensor[0].numel() ** -0.5)
        else:
            nn.init.uniform_(tensor, 0.1, 0.5)
    return model


def images():
    """Return two images with two objects each."""
    torch.manual_seed(1)
    batch = []
    for height, width in ((64, 96), (56, 80)):
        objects = Instances((height, width))
        triangles = [[4.0, 6.0, 40.0, 6.0, 22.0, 50.0], [30.0, 10.0, 70.0, 44.0, 30.0, 44.0]]
        objects.gt_masks = PolygonMasks([[triangle] for triangle in triangles])
        objects.gt_boxes = objects.gt_masks.get_bounding_boxes()
        objects.gt_classes = torch.tensor([3, 1])
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": objects, "height": height, "width": width})
    return batch


def detections(model):
    """Return all outputs of a model in evaluation mode as a list of tensors."""
    with torch.no_grad():
        outputs, _ = flatten_to_tuple(model.eval()(images()))
    tensors = [output for output in outputs if isinstance(output, torch.Tensor)]
    assert all(map(torch.numel, tensors))
    return tensors


def losses_and_gradients(model):
    """Return the training losses, and their gradients for parameters outside the blocks."""
    torch.manual_seed(2)  # proposals are sampled
    with EventStorage():
        losses = model.train()(images())
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    others = [p for name, p in parameters if ".nonlocal" not in name]
    return [*losses.values(), *torch.autograd.grad(sum(losses.values()), others)]


def equal(a, b):
    assert len(a) == len(b) > 0
    return all(map(torch.equal, a, b))
