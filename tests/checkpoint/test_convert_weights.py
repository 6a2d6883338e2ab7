"""Weights of mmdet, mmaction2 and video-nonlocal-net: converted, they compute the same."""

import logging
import pickle
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.modeling import build_backbone, build_model
from mmcv.cnn import NonLocal2d, NonLocal3d
from torch import nn

from nl_detectron.checkpoint import AuditedCheckpointer, convert
from nl_detectron.engine import load_config
from nl_detectron.layers import NonLocalBlock

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
CHANNELS = 32


def randomize(module, seed=0):
    """In double precision and evaluation mode; no two of its tensors are equal, none is zero."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -0.5
            tensor.uniform_(low, 1, generator=generator)
    return module


def prefixed(prefix, module):
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def load_block(weights, source, name, **options):
    """A NonLocalBlock with all of the converted tensors of that name, and nothing else in them."""
    tensors, left_out = convert(weights, source)
    assert not left_out
    block = NonLocalBlock(CHANNELS, **options).double().eval()
    block.load_state_dict({key.removeprefix(f"{name}."): t for key, t in tensors.items()})
    return block


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


MODES = ["gaussian", "embedded_gaussian", "dot_product", "concatenation"]


@pytest.mark.parametrize("norm", ["", "BN", "GN"])
@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("use_scale", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_mmcv_in_mmdet(mode, use_scale, sub_sample, norm):
    norm_cfg = {"": None, "BN": {"type": "BN"}, "GN": {"type": "GN", "num_groups": 32}}[norm]
    theirs = randomize(
        NonLocal2d(
            CHANNELS, mode=mode, use_scale=use_scale, sub_sample=sub_sample, norm_cfg=norm_cfg
        )
    )
    ours = load_block(
        {"meta": {}, "state_dict": prefixed("backbone.layer3.4.nonlocal_block_1.", theirs)},
        "mmdet",
        "res4.nonlocal4",
        instantiation=mode,
        scale=use_scale and mode != "gaussian",
        subsample="conv_pool" if sub_sample else "none",
        norm=norm,
    )
    x = torch.randn(2, CHANNELS, 6, 8, dtype=torch.float64)
    assert_same(ours(x), theirs(x))
    assert not torch.equal(ours(x), x)


@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_mmcv_in_mmaction2(mode, sub_sample):
    theirs = randomize(NonLocal3d(CHANNELS, mode=mode, sub_sample=sub_sample, use_scale=False))
    ours = load_block(
        prefixed("backbone.layer2.1.non_local_block.", theirs),
        "mmdet",
        "res3.nonlocal1",
        instantiation=mode,
        scale=False,
        subsample="conv_pool" if sub_sample else "none",
    )
    x = torch.randn(2, CHANNELS, 3, 4, 6, dtype=torch.float64)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_of_mmdet(tmp_path, depth):
    """Its names are torchvision's; the block is put after a residual block, as mmaction2 does."""
    theirs = randomize(getattr(torchvision.models, f"resnet{depth}")())
    channels = 256 if depth == 18 else 1024
    block = randomize(NonLocal2d(channels, norm_cfg={"type": "BN"}), seed=1)
    weights = {
        **prefixed("backbone.", theirs),
        **prefixed("backbone.layer3.0.nonlocal_block.", block),
        "neck.lateral_convs.0.conv.weight": torch.ones(1),
    }
    tensors, left_out = convert({"state_dict": weights}, "mmdet")
    assert left_out == [
        "backbone.fc.weight",
        "backbone.fc.bias",
        "neck.lateral_convs.0.conv.weight",
    ]

    options = f"""MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN MODEL.RESNETS.STRIDE_IN_1X1 False
        MODEL.BACKBONE.NAME build_nonlocal_backbone MODEL.NONLOCAL.LOCATION ('res4.0',)
        MODEL.NONLOCAL.BACKBONE build_resnet_backbone MODEL.NONLOCAL.NORM BN
        MODEL.NONLOCAL.SUBSAMPLE none MODEL.RESNETS.OUT_FEATURES ['res2','res3','res4','res5']
        MODEL.RESNETS.DEPTH {depth} MODEL.RESNETS.RES2_OUT_CHANNELS {channels // 4}"""
    ours = build_backbone(load_config(opts=options.split())).double().eval()
    ours.load_state_dict(tensors)

    theirs.layer3 = nn.Sequential(theirs.layer3[0], block, *theirs.layer3[1:])
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    features = ours(x)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for stage in range(2, 6):
        y = getattr(theirs, f"layer{stage - 1}")(y)
        assert_same(features[f"res{stage}"], y)


def caffe2_block(prefix, *, statistics):
    """A block of video-nonlocal-net: convolutions with bias, and a norm after W_z."""
    torch.manual_seed(0)
    inner = CHANNELS // 2
    shapes = dict.fromkeys(("theta_w", "phi_w", "g_w"), (inner, CHANNELS, 1, 1, 1))
    shapes |= dict.fromkeys(("theta_b", "phi_b", "g_b"), (inner,))
    shapes |= {"out_w": (CHANNELS, inner, 1, 1, 1)}
    names = ("out_b", "bn_s", "bn_b") + (("bn_rm", "bn_riv") if statistics else ())
    shapes |= dict.fromkeys(names, (CHANNELS,))
    return {
        f"{prefix}_{name}": torch.rand(shape, dtype=torch.float64).numpy()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("statistics", [True, False])
def test_block_of_video_nonlocal_net(statistics):
    blobs = caffe2_block("nonlocal_conv4_1", statistics=statistics)
    norm = "BN" if statistics else ""
    ours = load_block({"blobs": blobs}, "caffe2", "res4.nonlocal1", norm=norm)
    if statistics:  # they are not in the file, and no output depends on them
        assert ours.out.norm.num_batches_tracked == 0

    # The released code, in evaluation.
    x = torch.randn(2, CHANNELS, 2, 4, 6, dtype=torch.float64)
    w = {name.removeprefix("nonlocal_conv4_1_"): torch.tensor(v) for name, v in blobs.items()}
    pooled = F.max_pool3d(x, (1, 2, 2))
    theta, phi, g = (
        F.conv3d(source, w[f"{name}_w"], w[f"{name}_b"]).flatten(2)
        for name, source in (("theta", x), ("phi", pooled), ("g", pooled))
    )
    p = (theta.transpose(1, 2) @ phi * (CHANNELS // 2) ** -0.5).softmax(2)
    y = F.conv3d((g @ p.transpose(1, 2)).view(2, -1, *x.shape[2:]), w["out_w"], w["out_b"])
    if statistics:
        y = F.batch_norm(y, w["bn_rm"], w["bn_riv"], w["bn_s"], w["bn_b"])
    else:
        y = y * w["bn_s"].view(-1, 1, 1, 1) + w["bn_b"].view(-1, 1, 1, 1)
    assert_same(ours(x), x + y)


def test_longer_in_time_is_left_out():
    weights = {
        "res2_0_branch2a_w": torch.ones(4, 4, 3, 1, 1).numpy(),
        "res2_0_branch2b_w": torch.ones(4, 4, 1, 3, 3).numpy(),
        "nonlocal_conv4_1_theta_w_momentum": torch.ones(1).numpy(),
        "lr": 0.1,
    }
    tensors, left_out = convert({"blobs": weights}, "caffe2")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "res2.0.conv2.weight": (4, 4, 3, 3)
    }
    assert left_out == ["res2_0_branch2a_w", "nonlocal_conv4_1_theta_w_momentum", "lr"]


def to_caffe2(name):
    """res4.1.conv1.norm.weight -> res4_1_branch2a_bn_s, and so on."""
    name = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.", "")
    for number, letter in zip("123", "abc"):
        name = name.replace(f".conv{number}.", f".branch2{letter}.")
    name = name.replace("out.norm", "norm").replace("shortcut", "branch1").replace("norm", "bn")
    for ours, theirs in {"running_mean": "rm", "running_var": "riv"}.items():
        name = name.replace(ours, theirs)
    name = name.replace("bn.weight", "bn.s").replace("weight", "w").replace("bias", "b")
    return name.replace(".", "_").replace("res4_nonlocal", "nonlocal_conv4_")


@pytest.fixture
def tool(monkeypatch, capsys):
    """A function: run the tool in this process; return the exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["convert_weights.py", *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(REPOSITORY / "tools" / "convert_weights.py"), run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def test_round_trip_through_caffe2_names(tmp_path, caplog, tool):
    cfg = load_config(TINY, ["MODEL.NONLOCAL.NORM", "BN"])
    model, other = (randomize(build_model(cfg), seed).float() for seed in (0, 1))
    trunk = "backbone.bottom_up."
    tensors = {
        name.removeprefix(trunk): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(trunk) and not name.endswith("num_batches_tracked")
    }
    blobs = {to_caffe2(name): tensor.numpy() for name, tensor in tensors.items()}
    assert "nonlocal_conv4_4_bn_riv" in blobs and "res4_5_branch2c_w" in blobs
    blobs["pred_w"] = torch.ones(4, 3).numpy()
    old, new = tmp_path / "video.pkl", tmp_path / "ours.pth"
    old.write_bytes(pickle.dumps({"blobs": blobs}))

    status, said, _ = tool(old, new, "--from", "caffe2")
    assert status == 0
    assert said.splitlines() == [
        f"{new}: {len(tensors)} tensors",
        "its non-local blocks: MODEL.NONLOCAL.LOCATION \"('res4.4',)\"",
        "left out:",
        "    pred_w",
    ]
    with caplog.at_level(logging.INFO, "nl_detectron.checkpoint"):
        AuditedCheckpointer(other).load(str(new))
    assert "weights: 265/265 backbone tensors, 11/11 in res4.nonlocal4, FPN new" in caplog.text
    state = other.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(state[trunk + name], tensor), name


@pytest.mark.parametrize(
    "content, message",
    [
        (b"text", "cannot be read as a checkpoint"),
        (pickle.dumps({"a.b": torch.ones(1).numpy()}), "has no tensor of a ResNet .* 'a.b'"),
        (pickle.dumps([1]), "has no tensor of a ResNet under a name of mmdet"),
    ],
    ids=["no pickle", "other names", "no dict"],
)
def test_what_cannot_be_converted(tmp_path, tool, content, message):
    file = tmp_path / "in.pkl"
    file.write_bytes(content)
    status, said, errors = tool(file, tmp_path / "out.pth", "--from", "mmdet")
    assert status == 2 and said == ""
    assert re.fullmatch(f"error: {file} {message}.*\n", errors)
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_written(tmp_path, tool):
    file, new = tmp_path / "in.pth", tmp_path / "nowhere" / "out.pth"
    torch.save({"layer1.0.conv1.weight": torch.ones(1)}, file)
    status, _, errors = tool(file, new, "--from", "mmdet")
    assert status == 2 and errors.startswith(f"error: {new} could not be written (No such ")
