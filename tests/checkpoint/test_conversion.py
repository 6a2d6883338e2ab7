"""Converted weights of mmdet, mmaction2 and video-nonlocal-net compute the same function."""

import pickle

import convert_weights as tool
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.modeling import build_backbone
from torch import nn
from torch.testing import assert_close

from nl_detectron.checkpoint.conversion import convert, convert_file
from nl_detectron.checkpoint.reading import LoadError, read_checkpoint
from nl_detectron.engine import load_config
from nl_detectron.layers import NonLocalBlock

mmcv = pytest.importorskip("mmcv.cnn")

CHANNELS = 32


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


@pytest.mark.parametrize(
    "mode, use_scale, sub_sample, norm",
    [
        ("gaussian", False, True, "BN"),
        ("embedded_gaussian", True, False, "GN"),
        ("dot_product", True, True, ""),
        ("concatenation", False, True, "BN"),
    ],
)
@pytest.mark.parametrize(
    "prefix, kind",
    [
        ("backbone.layer3.4.nonlocal_block_1.", mmcv.NonLocal2d),  # mmdet
        ("module.backbone.layer3.4.non_local_block.", mmcv.NonLocal3d),  # mmaction2
    ],
)
def test_block_of_mmcv(prefix, kind, mode, use_scale, sub_sample, norm):
    norms = {"": None, "GN": {"type": "GN", "num_groups": 32}}
    norm_cfg = norms.get(norm, {"type": kind.__name__.replace("NonLocal", "BN")})
    options = {"use_scale": use_scale, "sub_sample": sub_sample, "norm_cfg": norm_cfg}
    theirs = randomize(kind(CHANNELS, mode=mode, **options))
    ours = load_block(
        {"meta": {}, "state_dict": with_prefix(prefix, theirs)},
        "mmdet",
        "res4.nonlocal4",
        instantiation=mode,
        scale=use_scale and mode != "gaussian",
        subsample="conv_pool" if sub_sample else "none",
        norm=norm,
    )
    space = (6, 8) if kind is mmcv.NonLocal2d else (3, 4, 6)
    x = torch.randn(2, CHANNELS, *space, dtype=torch.float64)
    assert_close(ours(x), theirs(x))
    assert not torch.equal(ours(x), x)


def test_mmdet_resnet():
    """Its names are torchvision's. The block stands after a residual block, as in mmaction2."""
    theirs = randomize(torchvision.models.resnet50())
    block = randomize(mmcv.NonLocal2d(1024, norm_cfg={"type": "BN"}))
    weights = with_prefix("backbone.", theirs)
    weights |= with_prefix("backbone.layer3.0.nonlocal_block.", block)
    weights["neck.lateral_convs.0.conv.weight"] = torch.ones(1)
    tensors, left_out = convert({"state_dict": weights}, "mmdet")
    fc = ["backbone.fc.weight", "backbone.fc.bias"]
    assert left_out == [*fc, "neck.lateral_convs.0.conv.weight"]

    options = """MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN MODEL.RESNETS.STRIDE_IN_1X1 False
        MODEL.BACKBONE.NAME build_nonlocal_backbone MODEL.NONLOCAL.LOCATION ('res4.0',)
        MODEL.NONLOCAL.BACKBONE build_resnet_backbone MODEL.NONLOCAL.NORM BN
        MODEL.NONLOCAL.SUBSAMPLE none MODEL.RESNETS.OUT_FEATURES ['res2','res3','res4','res5']"""
    ours = build_backbone(load_config(opts=options.split())).double().eval()
    ours.load_state_dict(tensors)

    theirs.layer3 = nn.Sequential(theirs.layer3[0], block, *theirs.layer3[1:])
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    features = ours(x)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for stage in range(2, 6):
        y = getattr(theirs, f"layer{stage - 1}")(y)
        assert_close(features[f"res{stage}"], y)


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
    assert_close(ours(x), x + y)


def test_tool(tmp_path, monkeypatch, capsys):
    names = {
        "conv1_w": "stem.conv1.weight",
        "res_conv1_bn_s": "stem.conv1.norm.weight",
        "res4_5_branch1_bn_rm": "res4.5.shortcut.norm.running_mean",
        "res4_5_branch2c_bn_riv": "res4.5.conv3.norm.running_var",
        "nonlocal_conv4_4_theta_w": "res4.nonlocal4.theta.weight",
        "nonlocal_conv4_4_bn_riv": "res4.nonlocal4.out.norm.running_var",
    }
    blobs = {name: np.full((2,), i, np.float32) for i, name in enumerate(names)}
    blobs |= {"res2_0_branch2a_w": np.ones((4, 4, 3, 1, 1)), "lr": 0.1}  # convolves in time
    old, new = tmp_path / "video.pkl", tmp_path / "converted.pth"
    old.write_bytes(pickle.dumps({"blobs": blobs}))
    monkeypatch.setattr("sys.argv", ["tool", str(old), str(new), "--from", "caffe2"])
    tool.main()
    assert capsys.readouterr().out.splitlines() == [
        f"{new}: 6 tensors",
        "non-local blocks: MODEL.NONLOCAL.LOCATION \"('res4.4',)\"",
        "left out:",
        *("    res2_0_branch2a_w", "    lr"),
    ]
    content = read_checkpoint(str(new))
    assert content["matching_heuristics"]
    found = {name: tensor[0].item() for name, tensor in content["model"].items()}
    assert found == {name: i for i, name in enumerate(names.values())}


@pytest.mark.parametrize("content, names", [({"a.b": np.ones(1)}, r"\['a.b'\]"), ([1], r"\[\]")])
def test_file_without_resnet(tmp_path, content, names):
    file = tmp_path / "in.pkl"
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(LoadError, match=f"^{file} has no ResNet .* of mmdet; it has {names}"):
        convert_file(str(file), str(tmp_path / "out.pth"), "mmdet")
    assert list(tmp_path.iterdir()) == [file]
