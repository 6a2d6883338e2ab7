"""The keypoint head of Table 6 against that of detectron2."""

import pytest
import torch
from detectors import equal, tiny_config
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_keypoint_head
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from nl_detectron import nonlocal_keypoint_head
from nl_detectron.errors import OptionError

REGION = ShapeSpec(channels=8, width=14, height=14)
NONLOCAL = ("MODEL.ROI_KEYPOINT_HEAD.NAME", "build_nonlocal_keypoint_head")
EVERY = "MODEL.NONLOCAL.KEYPOINT_HEAD.EVERY"


def build_head(*options, convolutions=8):
    options += ("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [32] * convolutions)
    return build_keypoint_head(tiny_config(*options), REGION)


def places(head):
    """Return the numbers of the convolutions after whose ReLU there is a block of that number."""
    names = [name for name, _ in head.named_children()]
    pairs = [(a.removeprefix("conv_fcn_relu"), b) for a, b in zip(names, names[1:])]
    return [int(number) for number, b in pairs if b == f"nonlocal{number}"]


def outputs(head, count):
    """Return the loss, its gradient for the input, and the predicted keypoints."""
    torch.manual_seed(1)
    people = Instances((64, 64))
    people.pred_boxes = people.proposal_boxes = Boxes(torch.tensor([[4.0, 4, 60, 60]] * count))
    points = torch.cat([torch.rand(count, 17, 2) * 50 + 6, torch.full((count, 17, 1), 2.0)], dim=2)
    people.gt_keypoints = Keypoints(points)
    features = torch.randn(count, 8, 14, 14, requires_grad=True)
    with EventStorage():
        (loss,) = head.train()(features, [people]).values()
    (gradient,) = torch.autograd.grad(loss, features)
    with torch.no_grad():
        (people,) = head.eval()(features, [people])
    return [loss, gradient, people.pred_keypoints, people.pred_keypoint_heatmaps]


@pytest.mark.parametrize("norm", ["", "BN", "GN"])
@pytest.mark.parametrize("count", [3, 0])
def test_new_blocks_change_no_bit(norm, count):
    plain, head = build_head(), build_head(*NONLOCAL, "MODEL.NONLOCAL.NORM", norm)
    missing, unexpected = head.load_state_dict(plain.state_dict(), strict=False)
    assert all(key.startswith("nonlocal") for key in missing) and not unexpected
    actual, expected = outputs(head, count), outputs(plain, count)
    assert expected[2].shape == (count, 17, 3) and bool(expected[0] > 0) == (count > 0)
    assert equal(actual, expected)


@pytest.mark.parametrize(
    "every, after, convolutions",
    [(1, range(1, 9), 8), (2, [2, 4, 6, 8], 8), (3, [3, 6], 8), (8, [8], 8), (2, [2, 4], 5)],
)
def test_every(every, after, convolutions):
    head = build_head(*NONLOCAL, EVERY, every, convolutions=convolutions)
    assert places(head) == list(after)


def test_insertion_into_an_existing_head():
    head = build_head().to("meta", torch.bfloat16).eval()
    modules = list(head.children())
    assert nonlocal_keypoint_head(head, every=4, instantiation="dot_product") is head
    assert places(head) == [4, 8]
    assert [m for name, m in head.named_children() if "nonlocal" not in name] == modules
    assert head.nonlocal4.instantiation == "dot_product" and not head.nonlocal4.training
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in head.nonlocal4.parameters())


def test_errors():
    """The head is unchanged after an error."""
    head = build_head()
    problem = "is not from 1 to 8, the number of convolutions"
    for every in (0, -1, 9):
        with pytest.raises(OptionError, match=f"^{EVERY} {every} {problem}$"):
            build_head(*NONLOCAL, EVERY, every)
    with pytest.raises(OptionError, match="^norm 'FrozenBN' is unknown"):
        nonlocal_keypoint_head(head, norm="FrozenBN")
    assert places(head) == []
    nonlocal_keypoint_head(head, 4)
    with pytest.raises(OptionError, match="^head already has non-local blocks"):
        nonlocal_keypoint_head(head, 2)
    assert places(head) == [4, 8]
