"""C2D and I3D: sizes and costs of the paper, weights, axes of the blocks, and released models."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone, build_model
from nl_video import load_config
from nl_video.model import AXES
from nl_video.trainer import VideoCheckpointer
from torch.testing import assert_close

from nl_detectron.analysis import count_multiply_adds, meta_model
from nl_detectron.layers import NonLocalBlock

PROJECT = Path(__file__).resolve().parents[1]
FIVE = "C2D_R50_NL_5_blocks"
FIVE_BLOCKS = [(3, 1), (3, 3), (4, 1), (4, 3), (4, 5)]
NARROW = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "INPUT.CLIP.CROP", 64]
NARROW += ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 8]
NARROW += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.VIDEO.NUM_CLASSES", 7]


def config(name, *options):
    return load_config(str(PROJECT / "configs" / f"{name}.yaml"), options)


def narrow(name, *options):
    torch.manual_seed(0)
    model = build_model(config(name, *NARROW, *options)).double().eval()
    for key, tensor in model.state_dict().items():
        if "norm" in key and "nonlocal" not in key and tensor.is_floating_point():
            tensor.uniform_(*((0, 0.2) if key.endswith(("mean", "bias")) else (0.3, 0.7)))
    return model


def clips(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    "frames, side, strides, expected",
    [  # frames and side of res2 to res5
        (32, 224, (2, 2, 2), [(8, 56), (4, 28), (4, 14), (4, 7)]),  # Table 1
        (32, 256, (2, 2, 2), [(8, 64), (4, 32), (4, 16), (4, 8)]),
        (8, 224, (2, 2, 2), [(2, 56), (1, 28), (1, 14), (1, 7)]),
        (8, 224, (1, 1, 2), [(8, 56), (4, 28), (4, 14), (4, 7)]),
    ],
)
@pytest.mark.parametrize("pooling", ["paper", "released"])
def test_output_sizes(frames, side, strides, expected, pooling):
    options = ["MODEL.VIDEO.STRIDES", strides, "MODEL.VIDEO.POOLING", pooling]
    options += ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]]
    model = meta_model(config("I3D_R50_NL_5_blocks", *options))
    features = model.backbone(torch.zeros(2, 3, frames, side, side, device="meta"))
    if pooling == "released":  # without padding, 112 becomes 55
        expected = [(expected[0][0], expected[0][1] - 1), *expected[1:]]
    assert [tuple(feature.shape[2:4]) for feature in features.values()] == expected


def count_by_hand(name):
    """Parameters and multiply-adds for one clip of 32 frames of 224 pixels."""
    i3d, axes = "I3D" in name, name.split("_")[-1]
    blocks = FIVE_BLOCKS if "5_blocks" in name else [(4, 4)] if "NL" in name else []

    def conv(c_in, c_out, kernel, outputs):
        return c_in * c_out * kernel + 2 * c_out, c_in * c_out * kernel * outputs

    counts = [conv(3, 64, 49 * (5 if i3d else 1), 16 * 112**2), (2048 * 400 + 400, 2048 * 400)]
    c = 64
    for stage, depth, width, t, side, inflated in (
        *((2, 3, 64, 8, 56, (0, 1, 2)), (3, 4, 128, 4, 28, (0, 2))),
        *((4, 6, 256, 4, 14, (0, 2, 4)), (5, 3, 512, 4, 7, (1,))),
    ):
        n = t * side**2
        for i in range(depth):
            temporal = 3 if i3d and i in inflated else 1
            counts.append(conv(c, width, temporal, 4 * n if i == 0 and stage > 2 else n))
            counts += [conv(width, width, 9, n), conv(width, 4 * width, 1, n)]
            counts += [conv(c, 4 * width, 1, n)] if i == 0 else []
            c, d = 4 * width, 2 * width
            if (stage, i) in blocks:
                pooled = n if axes == "time" else n // 4
                keys = {"space": pooled // t, "time": t}.get(axes, pooled)
                products = 2 * c * d * n + 2 * c * d * pooled + 2 * n * keys * d
                counts.append((4 * c * d + 3 * d + 2 * c, products))
    return tuple(map(sum, zip(*counts)))


@pytest.mark.parametrize(
    "name",
    ["C2D_R50", "C2D_R50_NL", FIVE, f"{FIVE}_space", f"{FIVE}_time", "I3D_R50"]
    + [f"I3D{FIVE[3:]}"],
)
def test_parameters_and_multiply_adds(name):
    model, clip = meta_model(config(name)), torch.zeros(1, 3, 32, 224, 224, device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (parameters, count_multiply_adds(model.scores, clip)) == count_by_hand(name)


def test_c2d_has_the_keys_and_the_function_of_a_resnet():
    model = narrow("C2D_R50", "MODEL.VIDEO.STRIDES", (1, 1, 1))
    cfg = config("C2D_R50", *NARROW, "MODEL.BACKBONE.NAME", "build_resnet_backbone")
    resnet = build_backbone(cfg).double().eval()
    resnet.load_state_dict(model.backbone.state_dict(), strict=True)
    frames = torch.randn(6, 3, 64, 48, dtype=torch.float64)
    video = frames.unflatten(0, (2, 3)).transpose(1, 2)
    features = model.backbone(video)["res5"].transpose(1, 2).flatten(0, 1)
    assert torch.equal(features, resnet(frames)["res5"])


@pytest.mark.parametrize("inflate, prefix", [("3x1x1", "backbone."), ("3x3x3", "")])
def test_i3d_of_equal_frames_is_c2d(inflate, prefix, tmp_path):
    c2d, i3d = narrow("C2D_R50"), narrow("I3D_R50", "MODEL.VIDEO.INFLATE", inflate)
    weights = {key.replace("backbone.", prefix): value for key, value in c2d.state_dict().items()}
    torch.save({"model": weights, "matching_heuristics": True}, tmp_path / "weights.pth")
    VideoCheckpointer(i3d).load(str(tmp_path / "weights.pth"))
    video = torch.randn(1, 3, 1, 32, 32, dtype=torch.float64).repeat(1, 1, 256, 1, 1)
    expected, features = c2d.backbone(video)["res5"], i3d.backbone(video)["res5"]
    # From each end, padding reaches one frame after the stem, four after res2 and three after
    # pool2; then six more 3-frame convolutions.
    assert_close(features[:, :, 9:23], expected[:, :, 9:23])
    assert not torch.allclose(features[:, :, :9], expected[:, :, :9])


@pytest.mark.parametrize("arch, norm", [("c2d", "BN"), ("i3d", "")])
@pytest.mark.parametrize("axes", ["spacetime", "space", "time"])
def test_new_blocks_are_the_identity(arch, axes, norm):
    options = ["MODEL.VIDEO.ARCH", arch, "MODEL.VIDEO.NONLOCAL_AXES", axes]
    model = narrow(FIVE, *options, "MODEL.NONLOCAL.NORM", norm)
    plain = narrow("C2D_R50", "MODEL.VIDEO.ARCH", arch)
    state = model.state_dict()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    inputs = [{"clips": clips(2, 3, 16, 64, 64)}]
    assert torch.equal(model(inputs)[0]["scores"], plain(inputs)[0]["scores"])


def test_axes_of_a_block():
    block = NonLocalBlock(8).double()
    torch.nn.init.normal_(block.out.weight)
    x = torch.randn(2, 8, 4, 4, 3, dtype=torch.float64)
    frames = torch.stack([block(frame) for frame in x.unbind(2)], dim=2)
    places = [block(x[..., i : i + 1, j : j + 1]) for i in range(4) for j in range(3)]
    expected = {"spacetime": block(x), "space": frames, "time": torch.cat(places, 4).view_as(x)}
    for axes, apply in AXES.items():
        assert_close(apply(block, x), expected[axes])


def test_evaluation_averages_views_and_windows():
    model, crop, wide = narrow(FIVE), clips(3, 3, 8, 64, 64), clips(1, 3, 8, 64, 128)
    # On a crop of the training's size, the fully convolutional test has one window: the whole.
    pooled = model.classifier(model.features(crop).mean(dim=(2, 3, 4))).softmax(dim=1)
    assert_close(model.scores(crop), pooled)
    features = model.features(wide).mean(dim=2)
    windows = [features[..., i : i + 2].mean(dim=(2, 3)) for i in range(3)]
    expected = torch.stack([model.classifier(w).softmax(1) for w in windows]).mean(dim=0)
    outputs = model([{"clips": crop}, {"clips": wide}])
    assert_close(outputs[0]["scores"], pooled.mean(dim=0))
    assert_close(outputs[1]["scores"], expected[0])


def released_network(blobs, x, strides, i3d):
    """Run the network of resnet_video_org.py with random weights, which are put into ``blobs``."""
    generator = np.random.default_rng(0)

    def blob(name, shape, low, high):
        blobs[name] = generator.uniform(low, high, shape)
        return torch.from_numpy(blobs[name])

    def norm(x, name):
        ranges = {"rm": (-0.2, 0.2), "riv": (0.5, 1), "s": (0.2, 0.5), "b": (-0.2, 0.2)}
        return F.batch_norm(
            x, *(blob(f"{name}_{key}", x.shape[1], *r) for key, r in ranges.items())
        )

    def conv(x, name, c_out, kernel, stride=(1, 1, 1), bn=None):
        limit = (3 / x.shape[1] / np.prod(kernel)) ** 0.5
        weight = blob(f"{name}_w", (c_out, x.shape[1], *kernel), -limit, limit)
        padding = [size // 2 for size in kernel]
        return norm(F.conv3d(x, weight, None, stride, padding), bn or f"{name}_bn")

    def embed(x, name, c_out):
        weight = blob(f"{name}_w", (c_out, x.shape[1], 1, 1, 1), -0.3, 0.3)
        return F.conv3d(x, weight, blob(f"{name}_b", c_out, -0.3, 0.3))

    x = conv(x, "conv1", 8, (5 if i3d else 1, 7, 7), (strides[0], 2, 2), "res_conv1_bn").relu()
    x = F.max_pool3d(x, (strides[1], 3, 3), (strides[1], 2, 2))
    for stage, depth in enumerate((3, 4, 6, 3), start=2):
        if stage == 3:
            x = F.max_pool3d(x, (strides[2], 1, 1))
        for i in range(depth):
            name, width = f"res{stage}_{i}_branch", 8 * 2 ** (stage - 2)
            stride = (1, 2, 2) if i == 0 and stage > 2 else (1, 1, 1)
            temporal = 3 if i3d and (stage == 2 or i % 2 == (stage == 5)) else 1
            y = conv(x, f"{name}2a", width, (temporal, 1, 1)).relu()
            y = conv(y, f"{name}2b", width, (1, 3, 3), stride).relu()
            y = conv(y, f"{name}2c", 4 * width, (1, 1, 1))
            x = conv(x, f"{name}1", 4 * width, (1, 1, 1), stride) if i == 0 else x
            x, name = (x + y).relu(), f"nonlocal_conv{stage}_{i}"
            if (stage, i) in FIVE_BLOCKS:
                pooled, d = F.max_pool3d(x, (1, 2, 2)), 2 * width
                theta = embed(x, f"{name}_theta", d).flatten(2)
                phi, g = (embed(pooled, f"{name}_{part}", d).flatten(2) for part in ("phi", "g"))
                p = (theta.transpose(1, 2) @ phi * d**-0.5).softmax(2)
                y = (g @ p.transpose(1, 2)).unflatten(2, x.shape[2:])
                x = x + norm(embed(y, f"{name}_out", 2 * d), f"{name}_bn")
    weight, bias = blob("pred_w", (7, x.shape[1]), -0.3, 0.3), blob("pred_b", 7, -0.3, 0.3)
    return F.linear(x.mean(dim=(2, 3, 4)), weight, bias).softmax(1)


@pytest.mark.parametrize("frames, strides", [(32, (2, 2, 2)), (8, (1, 1, 2))])
@pytest.mark.parametrize("name", ["I3D_R50_NL_5_blocks", FIVE])
def test_released_models(name, frames, strides, tmp_path):
    blobs = {"lr": np.float32(0.1), "conv1_w_momentum": np.ones(1)}
    clip = clips(1, 3, frames, 64, 64).double()
    expected = released_network(blobs, (clip - 114.75) / 57.375, strides, "I3D" in name)
    (tmp_path / "released.pkl").write_bytes(pickle.dumps({"blobs": blobs}))
    model = narrow(name, "MODEL.VIDEO.POOLING", "released", "MODEL.VIDEO.STRIDES", strides)
    VideoCheckpointer(model).load(str(tmp_path / "released.pkl"))
    assert_close(model.scores(clip), expected)
    model.backbone.pooling = "paper"
    assert not torch.allclose(model.scores(clip), expected)  # with another order: the trap
