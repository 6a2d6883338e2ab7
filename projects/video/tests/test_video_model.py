"""C2D and I3D: sizes and costs of the paper, weights, axes of the blocks, and released models."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone, build_model
from nl_video import load_config
from nl_video.weights import VideoCheckpointer, convert_released

from nl_detectron.analysis import count_multiply_adds, meta_model
from nl_detectron.checkpoint import LoadError
from nl_detectron.errors import UserError
from nl_detectron.layers import INSTANTIATIONS

PROJECT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.stem for path in (PROJECT / "configs").glob("*R50*.yaml"))
FIVE = "C2D_R50_NL_5_blocks"
NARROW = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "INPUT.CLIP.CROP", 64]
NARROW += ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 8]
NARROW += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.VIDEO.NUM_CLASSES", 7]


def config(name, *options):
    return load_config(str(PROJECT / "configs" / f"{name}.yaml"), options)


def narrow(name, *options):
    """A model of an eighth of the width, in float64, whose norms are not the identity."""
    torch.manual_seed(0)
    model = build_model(config(name, *NARROW, *options)).double().eval()
    for key, tensor in model.state_dict().items():
        if "norm" in key and "nonlocal" not in key and tensor.is_floating_point():
            tensor.uniform_(*((0, 0.2) if key.endswith(("mean", "bias")) else (0.3, 0.7)))
    return model


def clips(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "frames, side, strides, expected",
    [  # frames and side of the stem, then of res2 to res5
        (32, 224, (2, 2, 2), [(8, 56), (8, 56), (4, 28), (4, 14), (4, 7)]),  # Table 1
        (32, 256, (2, 2, 2), [(8, 64), (8, 64), (4, 32), (4, 16), (4, 8)]),
        (8, 224, (2, 2, 2), [(2, 56), (2, 56), (1, 28), (1, 14), (1, 7)]),
        (8, 224, (1, 1, 2), [(8, 56), (8, 56), (4, 28), (4, 14), (4, 7)]),
    ],
)
@pytest.mark.parametrize("arch", ["c2d", "i3d"])
@pytest.mark.parametrize("pooling", ["paper", "released"])
def test_output_sizes(frames, side, strides, expected, arch, pooling):
    options = ["MODEL.VIDEO.STRIDES", strides, "MODEL.VIDEO.ARCH", arch]
    options += ["MODEL.VIDEO.POOLING", pooling]
    names = ["stem", "res2", "res3", "res4", "res5"]
    model = meta_model(config(FIVE, *options, "MODEL.RESNETS.OUT_FEATURES", names[1:]))
    features = model.backbone(torch.zeros(2, 3, frames, side, side, device="meta"))
    features["stem"] = model.backbone.stem(torch.zeros(2, 3, frames, side, side, device="meta"))
    if pooling == "released":  # without padding, 112 becomes 55
        expected = [(t, s - 1 if i < 2 else s) for i, (t, s) in enumerate(expected)]
    assert [(features[name].shape[2], features[name].shape[3]) for name in names] == expected
    assert features["res5"].shape[:2] == (2, 2048)


def count_by_hand(blocks=(), axes="spacetime", i3d=False):
    """Parameters and multiply-adds of Table 1 for one clip of 32 frames of 224 pixels."""

    def conv(c_in, c_out, kernel, outputs):
        return c_in * c_out * kernel + 2 * c_out, c_in * c_out * kernel * outputs

    counts = [conv(3, 64, 49 * (5 if i3d else 1), 16 * 112**2)]
    channels = 64
    stages = [(3, 64, 8, 56, (0, 1, 2)), (4, 128, 4, 28, (0, 2)), (6, 256, 4, 14, (0, 2, 4))]
    for stage, (depth, width, t, side, inflated) in enumerate([*stages, (3, 512, 4, 7, (1,))]):
        for i in range(depth):
            before = t * (side * (2 if i == 0 and stage else 1)) ** 2
            temporal = 3 if i3d and i in inflated else 1
            counts.append(conv(channels, width, temporal, before))
            counts += [conv(width, width, 9, t * side**2), conv(width, 4 * width, 1, t * side**2)]
            if i == 0:
                counts.append(conv(channels, 4 * width, 1, t * side**2))
            channels = 4 * width
            if (stage + 2, i) in blocks:
                c, d, n = channels, channels // 2, t * side**2
                pooled = n if axes == "time" else n // 4
                keys = {"spacetime": pooled, "space": pooled // t, "time": t}[axes]
                products = 2 * c * d * n + 2 * c * d * pooled + 2 * n * keys * d
                counts.append((4 * c * d + 3 * d + 2 * c, products))
    counts.append((2048 * 400 + 400, 2048 * 400))
    return tuple(map(sum, zip(*counts)))


FIVE_BLOCKS = [(3, 1), (3, 3), (4, 1), (4, 3), (4, 5)]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("C2D_R50", count_by_hand()),
        ("C2D_R50_NL", count_by_hand([(4, 4)])),
        (FIVE, count_by_hand(FIVE_BLOCKS)),
        (f"{FIVE}_space", count_by_hand(FIVE_BLOCKS, axes="space")),
        (f"{FIVE}_time", count_by_hand(FIVE_BLOCKS, axes="time")),
        ("I3D_R50", count_by_hand(i3d=True)),
        ("I3D_R50_NL_5_blocks", count_by_hand(FIVE_BLOCKS, i3d=True)),
    ],
)
def test_parameters_and_multiply_adds(name, expected):
    model = meta_model(config(name))
    clip = torch.zeros(1, 3, 32, 224, 224, device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (parameters, count_multiply_adds(model.scores, clip)) == expected


def test_configs_are_in_the_readme_and_differ_in_their_rows():
    readme = (PROJECT / "README.md").read_text()
    locations = {name: len(meta_model(config(name)).state_dict()) for name in CONFIGS}
    assert all(f"`{name}`" in readme for name in CONFIGS)
    assert [n for n in CONFIGS if locations[n] > locations["I3D_R50"]] == [
        name for name in CONFIGS if "NL" in name
    ]
    for function in set(INSTANTIATIONS) - {"embedded_gaussian"}:
        assert config(f"C2D_R50_NL_{function}").MODEL.NONLOCAL.INSTANTIATION == function


def test_c2d_has_the_keys_and_the_function_of_a_resnet():
    model = narrow("C2D_R50", "MODEL.VIDEO.STRIDES", (1, 1, 1))
    cfg = config("C2D_R50", *NARROW, "MODEL.BACKBONE.NAME", "build_resnet_backbone")
    resnet = build_backbone(cfg).double().eval()
    resnet.load_state_dict(model.backbone.state_dict(), strict=True)
    frames = torch.randn(6, 3, 64, 48, dtype=torch.float64)
    video = frames.unflatten(0, (2, 3)).transpose(1, 2)
    features = model.backbone(video)["res5"].transpose(1, 2).flatten(0, 1)
    assert torch.equal(features, resnet(frames)["res5"])


@pytest.mark.parametrize("inflate", ["3x1x1", "3x3x3"])
def test_i3d_of_equal_frames_is_c2d(inflate, tmp_path):
    """Also the way from weights without a size in time to an I3D, with nothing left out."""
    c2d = narrow("C2D_R50")
    for prefix in ("backbone.", ""):  # of a C2D, and of an ImageNet model
        weights = {
            key.replace("backbone.", prefix): value for key, value in c2d.state_dict().items()
        }
        path = tmp_path / f"{prefix}weights.pth"
        torch.save({"model": weights, "matching_heuristics": True}, path)
        i3d = narrow("I3D_R50", "MODEL.VIDEO.INFLATE", inflate)
        VideoCheckpointer(i3d).load(str(path))
        video = torch.randn(1, 3, 1, 32, 32, dtype=torch.float64).repeat(1, 1, 256, 1, 1)
        expected, features = c2d.backbone(video)["res5"], i3d.backbone(video)["res5"]
        assert features.shape[2] == 32
        # From each end, padding reaches one frame after the stem, four after res2 and three after
        # pool2; then six more 3-frame convolutions.
        assert_same(features[:, :, 9:23], expected[:, :, 9:23])
        assert not torch.allclose(features[:, :, :9], expected[:, :, :9])


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"model": narrow("I3D_R50").state_dict()}, tmp_path / "i3d.pth")
    with pytest.raises(LoadError, match="backbone tensors are not loaded"):
        VideoCheckpointer(narrow("C2D_R50")).load(str(tmp_path / "i3d.pth"))


@pytest.mark.parametrize("norm", ["BN", ""])
@pytest.mark.parametrize("axes", ["spacetime", "space", "time"])
@pytest.mark.parametrize("arch", ["c2d", "i3d"])
def test_new_blocks_are_the_identity(arch, axes, norm):
    options = ["MODEL.VIDEO.ARCH", arch, "MODEL.VIDEO.NONLOCAL_AXES", axes]
    model = narrow(FIVE, *options, "MODEL.NONLOCAL.NORM", norm)
    plain = narrow("C2D_R50", "MODEL.VIDEO.ARCH", arch)
    state = model.state_dict()
    blocks = {".".join(key.split(".")[:3]) for key in state if "nonlocal" in key}
    assert blocks == {f"backbone.res{stage}.nonlocal{i}" for stage, i in FIVE_BLOCKS}
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    inputs = [{"clips": clips(2, 3, 16, 64, 64)}]
    assert torch.equal(model(inputs)[0]["scores"], plain(inputs)[0]["scores"])


@pytest.mark.parametrize("axes", ["spacetime", "space", "time"])
def test_positions_that_a_block_relates(axes):
    """Compare with the affinity over all positions, with the others masked out."""
    model = narrow(
        *("C2D_R50_NL", "MODEL.VIDEO.NONLOCAL_AXES", axes, "MODEL.NONLOCAL.SUBSAMPLE", "none")
    )
    stage, block = model.backbone.res4, model.backbone.res4.nonlocal4
    torch.nn.init.normal_(block.out.norm.weight)
    seen = []
    getattr(stage, "4").register_forward_hook(lambda module, inputs, output: seen.append(output))
    getattr(stage, "5").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.backbone(torch.randn(2, 3, 32, 64, 48, dtype=torch.float64))
    x, z = (frames.unflatten(0, (2, 4)).transpose(1, 2) for frames in seen)
    axes_index = torch.arange(4), torch.arange(12)  # frames, and the 4 x 3 places of each
    t, y = (index.flatten() for index in torch.meshgrid(*axes_index, indexing="ij"))
    theta, phi = block.embeddings(x)
    scores = theta @ phi.transpose(1, 2) * block.scale
    if axes != "spacetime":
        index = t if axes == "space" else y
        scores = scores.masked_fill(index[:, None] != index, -torch.inf)
    out = block.out((scores.softmax(2) @ block.values(x)).transpose(1, 2).unsqueeze(3))
    assert_same(z, x + out.reshape(x.shape))


def test_evaluation_averages_views_and_windows():
    model = narrow(FIVE, "TEST.CLIP.VIEWS_PER_FORWARD", 2)
    model.train()
    losses = model([{"clips": clips(1, 3, 8, 64, 64), "label": i} for i in range(2)])
    losses["loss_cls"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    crop, wide = clips(3, 3, 8, 64, 64), clips(1, 3, 8, 64, 128)
    # On a crop of the training's size, the fully convolutional test has one window: the whole.
    pooled = model.classifier(model.features(crop).mean(dim=(2, 3, 4))).softmax(dim=1)
    assert_same(model.scores(crop), pooled)
    features = model.features(wide).mean(dim=2)
    windows = [features[..., i : i + 2].mean(dim=(2, 3)) for i in range(3)]
    expected = torch.stack([model.classifier(w).softmax(1) for w in windows]).mean(dim=0)
    outputs = model([{"clips": crop}, {"clips": wide}])
    assert_same(outputs[0]["scores"], pooled.mean(dim=0))
    assert_same(outputs[1]["scores"], expected[0])
    assert model([{"clips": clips(1, 3, 1, 8, 8)}])[0]["scores"].shape == (7,)


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL.VIDEO.ARCH", "c3d"], "MODEL.VIDEO.ARCH 'c3d' is unknown; valid: 'c2d', 'i3d'"),
        (["MODEL.VIDEO.NONLOCAL_AXES", "all"], "MODEL.VIDEO.NONLOCAL_AXES 'all' is unknown"),
        (["MODEL.VIDEO.STRIDES", (2, 2)], "MODEL.VIDEO.STRIDES"),
        (["MODEL.VIDEO.POOLING", "released", "INPUT.CLIP.FRAMES", 7], "INPUT.CLIP.FRAMES 7 is"),
        (["MODEL.VIDEO.ARCH", "i3d", "MODEL.RESNETS.DEPTH", 18], "MODEL.RESNETS.DEPTH 50"),
        (["MODEL.VIDEO.ARCHITECTURE", "i3d"], "Non-existent key"),
    ],
)
def test_bad_keys(options, message):
    with pytest.raises(UserError, match=message):
        build_model(config("C2D_R50", *options))


def released_blobs(i3d, classes=7):
    """Random weights with the names and, but for the width, the shapes of the released files."""
    generator = np.random.default_rng(0)
    blobs = {"lr": np.float32(0.1), "conv1_w_momentum": np.ones(1), "pred_b": np.ones(classes)}

    def conv(name, c_out, c_in, t, size):
        fan = c_in * t * size**2
        blobs[f"{name}_w"] = generator.normal(0, fan**-0.5, (c_out, c_in, t, size, size))
        norm("res_conv1_bn" if name == "conv1" else f"{name}_bn", c_out)

    def norm(name, channels):
        ranges = {"s": (0.2, 0.5), "b": (-0.2, 0.2), "rm": (-0.2, 0.2), "riv": (0.5, 1)}
        for part, (low, high) in ranges.items():
            blobs[f"{name}_{part}"] = generator.uniform(low, high, channels)

    conv("conv1", 8, 3, 5 if i3d else 1, 7)
    channels = 8
    for stage, depth in enumerate((3, 4, 6, 3), start=2):
        inner = 8 * 2 ** (stage - 2)
        for i in range(depth):
            name = f"res{stage}_{i}_branch"
            temporal = 3 if i3d and (stage == 2 or i % 2 == (stage == 5)) else 1
            conv(f"{name}2a", inner, channels, temporal, 1)
            conv(f"{name}2b", inner, inner, 1, 3)
            conv(f"{name}2c", 4 * inner, inner, 1, 1)
            if i == 0:
                conv(f"{name}1", 4 * inner, channels, 1, 1)
            channels = 4 * inner
            if (stage, i) in FIVE_BLOCKS:
                name, d = f"nonlocal_conv{stage}_{i}", channels // 2
                for part in ("theta", "phi", "g", "out"):
                    shape = (channels, d) if part == "out" else (d, channels)
                    blobs[f"{name}_{part}_w"] = generator.normal(0, 0.2, (*shape, 1, 1, 1))
                    blobs[f"{name}_{part}_b"] = generator.normal(0, 0.2, shape[0])
                norm(f"{name}_bn", channels)
    blobs["pred_w"] = generator.normal(0, 0.2, (classes, channels))
    return blobs


def released_forward(blobs, x, strides):
    """The network of resnet_video_org.py, or of resnet_video.py with strides 1, 1, 2."""
    w = {name: torch.as_tensor(value) for name, value in blobs.items()}

    def norm(x, name):
        return F.batch_norm(x, *(w[f"{name}_{part}"] for part in ("rm", "riv", "s", "b")))

    def conv(x, name, stride=(1, 1, 1), bn=None):
        weight = w[f"{name}_w"]
        padding = [size // 2 for size in weight.shape[2:]]
        return norm(F.conv3d(x, weight, None, stride, padding), bn or f"{name}_bn")

    def embed(x, name):
        return F.conv3d(x, w[f"{name}_w"], w[f"{name}_b"])

    x = conv(x, "conv1", (strides[0], 2, 2), bn="res_conv1_bn").relu()
    x = F.max_pool3d(x, (strides[1], 3, 3), (strides[1], 2, 2))
    for stage, depth in enumerate((3, 4, 6, 3), start=2):
        if stage == 3:
            x = F.max_pool3d(x, (strides[2], 1, 1))
        for i in range(depth):
            name, stride = f"res{stage}_{i}_branch", 2 if i == 0 and stage > 2 else 1
            y = conv(x, f"{name}2a").relu()
            y = conv(conv(y, f"{name}2b", (1, stride, stride)).relu(), f"{name}2c")
            x = (y + (conv(x, f"{name}1", (1, stride, stride)) if i == 0 else x)).relu()
            name = f"nonlocal_conv{stage}_{i}"
            if f"{name}_g_w" in w:
                pooled = F.max_pool3d(x, (1, 2, 2))
                theta = embed(x, f"{name}_theta").flatten(2)
                phi, g = (embed(pooled, f"{name}_{part}").flatten(2) for part in ("phi", "g"))
                p = (theta.transpose(1, 2) @ phi * theta.shape[1] ** -0.5).softmax(2)
                y = (g @ p.transpose(1, 2)).unflatten(2, x.shape[2:])
                x = x + norm(embed(y, f"{name}_out"), f"{name}_bn")
    return F.linear(x.mean(dim=(2, 3, 4)), w["pred_w"], w["pred_b"]).softmax(1)


@pytest.mark.parametrize("frames, strides", [(32, (2, 2, 2)), (8, (1, 1, 2))])
@pytest.mark.parametrize("name", ["I3D_R50_NL_5_blocks", FIVE])
def test_released_models(name, frames, strides):
    blobs = released_blobs("I3D" in name)
    model = narrow(name, "MODEL.VIDEO.POOLING", "released", "MODEL.VIDEO.STRIDES", strides)
    weights, left_out = convert_released(blobs)
    assert left_out == ["lr", "conv1_w_momentum"]
    incompatible = model.load_state_dict(weights, strict=False)
    assert all(key.endswith("num_batches_tracked") for key in incompatible.missing_keys)
    assert not incompatible.unexpected_keys
    clip = clips(1, 3, frames, 64, 64).double()
    expected = released_forward(blobs, (clip - 114.75) / 57.375, strides)
    assert_same(model.scores(clip), expected)
    model.backbone.pooling = "paper"
    assert not torch.allclose(model.scores(clip), expected)  # with another order: the trap
