"""The audit of ImageNet weights and zoo weights, in each of their formats."""

import logging
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from helpers import TINY

from nl_detectron.checkpoint import AuditedCheckpointer, LoadError
from nl_detectron.engine import load_config

TRUNK = "backbone.bottom_up."
BLOCK = "res4.nonlocal4"
STATISTICS = (".running_mean", ".running_var")

PLAIN = "MODEL.BACKBONE.NAME build_resnet_fpn_backbone"
R101 = "MODEL.RESNETS.DEPTH 101"
FROZEN = "MODEL.RESNETS.NORM FrozenBN"
RES3_AND_RES4 = "MODEL.NONLOCAL.LOCATION ('res3.1::2','res4.-2')"
C4 = """MODEL.NONLOCAL.BACKBONE build_resnet_backbone MODEL.RESNETS.OUT_FEATURES ['res4']
    MODEL.RPN.IN_FEATURES ['res4'] MODEL.ANCHOR_GENERATOR.SIZES [[32]] MODEL.MASK_ON False
    MODEL.ROI_HEADS.NAME Res5ROIHeads MODEL.ROI_HEADS.IN_FEATURES ['res4']"""
KEYPOINTS = """MODEL.MASK_ON False MODEL.KEYPOINT_ON True
    MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (8,8,8,8) MODEL.ROI_KEYPOINT_HEAD.NAME"""


def make_model(*options):
    """Return the tiny R50-FPN Mask R-CNN with a block in res4, and with random tensors."""
    model = build_model(load_config(TINY, " ".join(("MODEL.DEVICE cpu", *options)).split()))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    return model


def tensors_of(model):
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not name.endswith(".num_batches_tracked")
    }


# Zoo files have all tensors of a model; ImageNet files those of the backbone and a classifier.


def zoo_pth(path, tensors):
    torch.save({"model": tensors}, path)


def torchvision_pkl(path, tensors):
    arrays = {k[len(TRUNK) :]: v.numpy() for k, v in tensors.items() if k.startswith(TRUNK)}
    arrays["stem.fc.weight"] = torch.ones(3, 4).numpy()
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))


def caffe2_pkl(path, tensors, scale="gamma", bias="beta"):
    """Write with the names of MSRA's ResNets, such as res2_0_branch2a_bn_gamma."""

    def rename(name):
        name = name.replace("stem.conv1.norm", "res_conv1.norm").replace("stem.", "")
        for number, letter in zip("123", "abc"):
            name = name.replace(f".conv{number}.", f".branch2{letter}.")
        name = name.replace("shortcut", "branch1").replace("norm.running", "bn_running")
        name = name.replace("norm.weight", f"bn_{scale}").replace("norm.bias", f"bn_{bias}")
        return name.replace("weight", "w").replace(".", "_")

    blobs = {rename(k[len(TRUNK) :]): v.numpy() for k, v in tensors.items() if k.startswith(TRUNK)}
    blobs["conv1_b"] = blobs["fc1000_b"] = torch.ones(3).numpy()
    path.write_bytes(pickle.dumps(blobs))


def folded_caffe2_pkl(path, tensors):
    """Write as Detectron's ResNeXts, with folded statistics: res2_0_branch2a_bn_s and _b."""
    kept = {k: v for k, v in tensors.items() if not k.endswith(STATISTICS)}
    caffe2_pkl(path, kept, scale="s", bias="b")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that writes tensors, loads them, and returns the logged summary."""
    logged = []
    logger = logging.getLogger("nl_detectron.checkpoint.checkpointer")
    monkeypatch.setattr(logger, "info", logged.append)

    def write_and_load(write, tensors, model, **options):
        path = tmp_path / ("weights.pth" if write is zoo_pth else "weights.pkl")
        write(path, tensors)
        AuditedCheckpointer(model, **options).load(str(path))
        return logged.pop()

    return write_and_load


def assert_state(model, tensors):
    torch.testing.assert_close(tensors_of(model), tensors, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["", FROZEN], ids=["BN", "FrozenBN"])
@pytest.mark.parametrize("write", [torchvision_pkl, caffe2_pkl, folded_caffe2_pkl])
def test_imagenet_weights(load, write, norm):
    tensors = tensors_of(make_model(PLAIN, norm))
    names = [name for name in tensors if name.startswith(TRUNK)]
    assert len(names) == 53 * 5  # R50's convolutions, each with a norm
    if write is folded_caffe2_pkl:
        names = [name for name in names if not name.endswith(STATISTICS)]
    model = make_model(norm)
    expected = tensors_of(model)
    assert load(write, tensors, model) == (
        f"weights: {len(names)}/{len(names)} backbone tensors, 8 new in {BLOCK}, FPN new, heads new"
    )
    for name, tensor in expected.items():
        if name in names:
            tensor.copy_(tensors[name])
        elif norm == FROZEN and name.endswith(STATISTICS):  # missing statistics become 0 and 1
            tensor.fill_(name.endswith("var"))
    assert_state(model, expected)


@pytest.mark.parametrize("norm", ["", FROZEN], ids=["BN", "FrozenBN"])
def test_zoo_weights(load, norm):
    tensors = tensors_of(make_model(PLAIN, norm))
    heads = [name for name in tensors if not name.startswith("backbone.")]
    for name in ("backbone.fpn_lateral2.bias", heads[0], heads[1]):
        del tensors[name]
    model = make_model(norm, RES3_AND_RES4)
    expected = {**tensors_of(model), **tensors}
    assert load(zoo_pth, tensors, model) == (
        "weights: 265/265 backbone tensors, 8 new in res3.nonlocal1, 8 new in res3.nonlocal3, "
        f"8 new in res4.nonlocal4, FPN 15/16 tensors, heads {len(heads) - 2}/{len(heads)} tensors"
    )
    assert_state(model, expected)
    assert load(zoo_pth, expected, model).endswith(" 8/8 in res4.nonlocal4, FPN all, heads all")


def test_without_fpn(load):
    source, model = make_model(PLAIN), make_model(C4)
    tensors = tensors_of(source)
    heads = [name for name in tensors_of(model) if not name.startswith("backbone.")]
    res5 = [name for name in heads if name.startswith("roi_heads.res5.")]
    stages = [name for name in tensors if name.startswith(TRUNK) and ".res5." not in name]
    assert load(caffe2_pkl, tensors, model) == (
        f"weights: {len(stages)}/{len(stages)} backbone tensors, 8 new in {BLOCK}, "
        f"heads {len(res5)}/{len(heads)} tensors"
    )


@pytest.mark.parametrize("write", [zoo_pth, torchvision_pkl, caffe2_pkl])
@pytest.mark.parametrize(
    "name, is_missing",
    [
        ("stem.conv1.weight", True),
        ("res4.5.conv2.norm.running_var", True),  # FrozenBN does not report it
        ("res4.5.conv3.weight", False),
    ],
)
def test_tensor_that_does_not_fit(load, write, name, is_missing):
    tensors = tensors_of(make_model(PLAIN, FROZEN))
    tensor = tensors.pop(TRUNK + name)
    if not is_missing:
        tensors[TRUNK + name] = tensor[1:]
    shape = "missing" if is_missing else tuple(tensor[1:].shape)
    with pytest.raises(LoadError) as error:
        load(write, tensors, make_model(FROZEN))
    message = str(error.value)
    reason = f"{TRUNK}{name} ({shape} in the file, {tuple(tensor.shape)} in the model); compare"
    assert f"1 of 265 backbone tensors are not loaded: {reason}" in message
    assert "/weights.p" in message and "MODEL.WEIGHTS_PARTIAL True" in message
    line = load(write, tensors, make_model(FROZEN), partial=True)
    assert line.startswith("weights: 264/265 backbone tensors, 8 new in ")


def test_missing_statistics(load):
    """Only Caffe2 folds them into scale and bias."""
    tensors = {k: v for k, v in tensors_of(make_model()).items() if not k.endswith(STATISTICS)}
    with pytest.raises(LoadError, match="106 of 265 .*running_mean .* and 103 more"):
        load(zoo_pth, tensors, make_model())


HEAD = "roi_heads.keypoint_head.nonlocal"
NONLOCAL_HEAD = f"{KEYPOINTS} build_nonlocal_keypoint_head"


@pytest.mark.parametrize(
    "source, target, problem",
    [
        (f"{PLAIN} {R101}", "", r"file has res4\.\d+, .* and 14 more, which"),
        (PLAIN, R101, r"255 of 520 .*: backbone.bottom_up.res4.\d+.* 252 more"),
        ("", PLAIN, f"the file has {BLOCK}, which the model lacks"),
        ("", "MODEL.NONLOCAL.LOCATION ('res4.1',)", f"the file has {BLOCK}, which the model lacks"),
        ("", "MODEL.NONLOCAL.REDUCTION 4", f"only 1 of 8 tensors of {BLOCK} are loaded"),
        (NONLOCAL_HEAD, f"{KEYPOINTS} KRCNNConvDeconvUpsampleHead", f"has {HEAD}2, {HEAD}4, which"),
    ],
)
def test_weights_of_another_model(load, source, target, problem):
    with pytest.raises(LoadError, match=problem):
        load(zoo_pth, tensors_of(make_model(source)), make_model(target))
