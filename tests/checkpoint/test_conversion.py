"""Converted weights of mmdet, mmaction2 and video-nonlocal-net compute the same function."""

import pickle
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from mmcv.cnn import NonLocal2d, NonLocal3d
from torch import nn

from nl_detectron.checkpoint import AuditedCheckpointer
from nl_detectron.checkpoint.conversion import convert
from nl_detectron.config import add_nonlocal_config
from nl_detectron.layers import NonLocalBlock

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_weights.py"
CHANNELS = 32


def make_config(options):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(options.split())
    return cfg


def randomize(module):
    """Fill a module with random double-precision values, none of which are zero."""
    generator = torch.Generator().manual_seed(0)
    module.double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name.endswith("running_var") else -0.5
            tensor.uniform_(low, 1, generator=generator)
    return module


def with_prefix(prefix, module):
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def load_block(weights, source, name, **options):
    """Return a NonLocalBlock with the converted tensors, all of which it must use."""
    tensors, left_out = convert(weights, source)
    assert not left_out
    block = NonLocalBlock(CHANNELS, **options).double().eval()
    block.load_state_dict({key.removeprefix(f"{name}."): t for key, t in tensors.items()})
    return block


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "mode, use_scale, sub_sample, norm",
    [
        ("gaussian", True, False, ""),
        ("gaussian", False, True, "BN"),
        ("embedded_gaussian", True, False, "GN"),
        ("embedded_gaussian", False, True, ""),
        ("dot_product", True, False, "BN"),
        ("dot_product", False, True, "GN"),
        ("concatenation", True, False, ""),
        ("concatenation", False, True, "BN"),
    ],
)
def test_mmdet_block(mode, use_scale, sub_sample, norm):
    norm_cfg = {"": None, "BN": {"type": "BN"}, "GN": {"type": "GN", "num_groups": 32}}[norm]
    options = {"use_scale": use_scale, "sub_sample": sub_sample, "norm_cfg": norm_cfg}
    theirs = randomize(NonLocal2d(CHANNELS, mode=mode, **options))
    ours = load_block(
        {"meta": {}, "state_dict": with_prefix("backbone.layer3.4.nonlocal_block_1.", theirs)},
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
@pytest.mark.parametrize("mode", ["embedded_gaussian", "concatenation"])
def test_mmaction2_block(mode, sub_sample):
    theirs = randomize(NonLocal3d(CHANNELS, mode=mode, sub_sample=sub_sample, use_scale=False))
    ours = load_block(
        with_prefix("backbone.layer2.1.non_local_block.", theirs),
        "mmdet",
        "res3.nonlocal1",
        instantiation=mode,
        scale=False,
        subsample="conv_pool" if sub_sample else "none",
    )
    x = torch.randn(2, CHANNELS, 3, 4, 6, dtype=torch.float64)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("depth", [18, 50])
def test_mmdet_resnet(depth):
    """Its names are torchvision's. The block stands after a residual block, as in mmaction2."""
    theirs = randomize(getattr(torchvision.models, f"resnet{depth}")())
    channels = 256 if depth == 18 else 1024
    block = randomize(NonLocal2d(channels, norm_cfg={"type": "BN"}))
    tensors, left_out = convert(
        {
            "state_dict": {
                **with_prefix("backbone.", theirs),
                **with_prefix("backbone.layer3.0.nonlocal_block.", block),
                "neck.lateral_convs.0.conv.weight": torch.ones(1),
            }
        },
        "mmdet",
    )
    fc = ["backbone.fc.weight", "backbone.fc.bias"]
    assert left_out == [*fc, "neck.lateral_convs.0.conv.weight"]

    options = f"""MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN MODEL.RESNETS.STRIDE_IN_1X1 False
        MODEL.BACKBONE.NAME build_nonlocal_backbone MODEL.NONLOCAL.LOCATION ('res4.0',)
        MODEL.NONLOCAL.BACKBONE build_resnet_backbone MODEL.NONLOCAL.NORM BN
        MODEL.NONLOCAL.SUBSAMPLE none MODEL.RESNETS.OUT_FEATURES ['res2','res3','res4','res5']
        MODEL.RESNETS.DEPTH {depth} MODEL.RESNETS.RES2_OUT_CHANNELS {channels // 4}"""
    ours = build_backbone(make_config(options)).double().eval()
    ours.load_state_dict(tensors)

    theirs.layer3 = nn.Sequential(theirs.layer3[0], block, *theirs.layer3[1:])
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    features = ours(x)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for stage in range(2, 6):
        y = getattr(theirs, f"layer{stage - 1}")(y)
        assert_same(features[f"res{stage}"], y)


@pytest.mark.parametrize("statistics", [True, False])
def test_video_nonlocal_net_block(statistics):
    """With USE_AFFINE, the norm has no statistics."""
    inner, prefix = CHANNELS // 2, "nonlocal_conv4_1_"
    shapes = dict.fromkeys(("theta_w", "phi_w", "g_w"), (inner, CHANNELS, 1, 1, 1))
    shapes |= dict.fromkeys(("theta_b", "phi_b", "g_b"), (inner,))
    shapes["out_w"] = (CHANNELS, inner, 1, 1, 1)
    norm = ("bn_s", "bn_b", "bn_rm", "bn_riv") if statistics else ("bn_s", "bn_b")
    shapes |= dict.fromkeys(("out_b", *norm), (CHANNELS,))
    w = {name: torch.rand(shape, dtype=torch.float64) for name, shape in shapes.items()}
    blobs = {prefix + name: tensor.numpy() for name, tensor in w.items()}
    norm = "BN" if statistics else ""
    ours = load_block({"blobs": blobs}, "caffe2", "res4.nonlocal1", norm=norm)

    # The released code in evaluation.
    x = torch.randn(2, CHANNELS, 2, 4, 6, dtype=torch.float64)
    pooled = F.max_pool3d(x, (1, 2, 2))
    theta, phi, g = (
        F.conv3d(source, w[f"{name}_w"], w[f"{name}_b"]).flatten(2)
        for name, source in (("theta", x), ("phi", pooled), ("g", pooled))
    )
    p = (theta.transpose(1, 2) @ phi * inner**-0.5).softmax(2)
    y = F.conv3d((g @ p.transpose(1, 2)).view(2, -1, *x.shape[2:]), w["out_w"], w["out_b"])
    if statistics:
        y = F.batch_norm(y, w["bn_rm"], w["bn_riv"], w["bn_s"], w["bn_b"])
    else:
        y = y * w["bn_s"].view(-1, 1, 1, 1) + w["bn_b"].view(-1, 1, 1, 1)
    assert_same(ours(x), x + y)


def test_kernels_in_time_are_left_out():
    blobs = {
        "res2_0_branch2a_w": torch.ones(4, 4, 3, 1, 1).numpy(),
        "res2_0_branch2b_w": torch.ones(4, 4, 1, 3, 3).numpy(),
        "nonlocal_conv4_1_theta_w_momentum": torch.ones(1).numpy(),
        "lr": 0.1,
    }
    tensors, left_out = convert({"blobs": blobs}, "caffe2")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "res2.0.conv2.weight": (4, 4, 3, 3)
    }
    assert left_out == ["res2_0_branch2a_w", "nonlocal_conv4_1_theta_w_momentum", "lr"]


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Return a function that runs the tool and returns its exit status, stdout and stderr."""
    main = runpy.run_path(str(TOOL))["main"]

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["convert_weights.py", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def to_caffe2(name):
    """Convert a name such as res4.1.conv1.norm.weight to res4_1_branch2a_bn_s."""
    name = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.", "")
    for number, letter in zip("123", "abc"):
        name = name.replace(f".conv{number}.", f".branch2{letter}.")
    name = name.replace("out.norm", "norm").replace("shortcut", "branch1").replace("norm", "bn")
    for ours, theirs in {"running_mean": "rm", "running_var": "riv"}.items():
        name = name.replace(ours, theirs)
    name = name.replace("bn.weight", "bn.s").replace("weight", "w").replace("bias", "b")
    return name.replace(".", "_").replace("res4_nonlocal", "nonlocal_conv4_")


def test_tool_writes_a_file_that_loads(tmp_path, run_tool):
    cfg = make_config("MODEL.NONLOCAL.NORM BN")
    cfg.merge_from_file(str(TOOL.parents[1] / "tests" / "mask_rcnn_tiny.yaml"))
    model, other = nn.Module(), nn.Module()
    model.backbone, other.backbone = build_backbone(cfg), build_backbone(cfg)
    tensors = {
        name.removeprefix("bottom_up."): tensor
        for name, tensor in randomize(model.backbone).float().state_dict().items()
        if name.startswith("bottom_up.") and not name.endswith("num_batches_tracked")
    }
    blobs = {to_caffe2(name): tensor.numpy() for name, tensor in tensors.items()}
    blobs["pred_w"] = torch.ones(4, 3).numpy()
    old, new = tmp_path / "video.pkl", tmp_path / "converted.pth"
    old.write_bytes(pickle.dumps({"blobs": blobs}))

    status, printed, _ = run_tool(old, new, "--from", "caffe2")
    assert status == 0
    assert printed.splitlines() == [
        f"{new}: {len(tensors)} tensors",
        "non-local blocks: MODEL.NONLOCAL.LOCATION \"('res4.4',)\"",
        "left out:",
        "    pred_w",
    ]
    AuditedCheckpointer(other).load(str(new))
    state = other.backbone.bottom_up.state_dict()
    assert len(tensors) == 265 + 11
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(
    "content, message",
    [
        (b"text", "cannot be read as a checkpoint"),
        (pickle.dumps({"a.b": torch.ones(1).numpy()}), "has no tensor of a ResNet .* 'a.b'"),
        (pickle.dumps([1]), "has no tensor of a ResNet with a name of mmdet"),
    ],
    ids=["no pickle", "other names", "no dict"],
)
def test_files_that_cannot_be_converted(tmp_path, run_tool, content, message):
    file = tmp_path / "in.pkl"
    file.write_bytes(content)
    status, printed, errors = run_tool(file, tmp_path / "out.pth", "--from", "mmdet")
    assert status == 2 and printed == ""
    assert re.fullmatch(f"error: {file} {message}.*\n", errors)
    assert list(tmp_path.iterdir()) == [file]
