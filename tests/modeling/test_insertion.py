"""Where blocks land, what is said about them, and what bad places get."""

import logging

import pytest
import torch
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem
from helpers import DEPTHS, backbone_without_weights, model_without_weights, zoo_config
from torch import nn

from nl_detectron import NonLocalBlock, insert_nonlocal

DEFORMABLE = "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"
DC5 = "COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml"


def plain_backbone(depth=50):
    return backbone_without_weights(zoo_config(depth=depth))


def regnet():
    torch.manual_seed(0)
    return RegNet(
        stem_class=SimpleStem,
        stem_width=32,
        block_class=ResBottleneckBlock,
        depth=10,
        w_a=36,
        w_0=24,
        w_m=2.5,
        group_width=8,
        out_features=["s1", "s2", "s3", "s4"],
    )


def order(stage):
    """The names of a stage's children, in the order in which they run."""
    return [name for name, _ in stage.named_children()]


def with_blocks(count, after):
    """What ``order`` is for a stage of ``count`` residual blocks, with a new one after those."""
    names = []
    for index in range(count):
        names += [str(index)] + [f"nonlocal{index}"] * (index in after)
    return names


@pytest.fixture
def report():
    """The messages that are logged, whatever has been set up for the package's logger."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("nl_detectron.modeling.insertion")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


ONE = ["res4.-2"]
EVERY_OTHER = ["res3.1::2", "res4.1::2"]
ALL = ["res3.*", "res4.*"]
BLOCKS = {18: (2, 2), 34: (4, 6), 50: (4, 6), 101: (4, 23), 152: (8, 36)}  # of res3 and res4


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    "location, res3, res4",
    [
        (ONE, lambda n: [], lambda n: [n - 2]),
        (EVERY_OTHER, lambda n: range(1, n, 2), lambda n: range(1, n, 2)),
        (ALL, range, range),
    ],
    ids=["one", "every_other", "all"],
)
def test_the_papers_places(depth, location, res3, res4):
    """Before the last residual block of res4; after every other of res3 and res4; after each."""
    backbone = plain_backbone(depth)
    names = insert_nonlocal(backbone, location)
    count3, count4 = BLOCKS[depth]
    assert order(backbone.bottom_up.res3) == with_blocks(count3, res3(count3))
    assert order(backbone.bottom_up.res4) == with_blocks(count4, res4(count4))
    assert names == [f"bottom_up.res3.nonlocal{i}" for i in res3(count3)] + [
        f"bottom_up.res4.nonlocal{i}" for i in res4(count4)
    ]


@pytest.mark.parametrize(
    "depth, location, res3, res4",
    [
        (50, EVERY_OTHER, [1, 3], [1, 3, 5]),
        (101, ["res3.1::2", "res4.6::7"], [1, 3], [6, 13, 20]),
    ],
)
def test_five_blocks_of_the_released_code(depth, location, res3, res4):
    backbone = plain_backbone(depth)
    assert len(insert_nonlocal(backbone, location)) == 5
    assert order(backbone.bottom_up.res3) == with_blocks(4, res3)
    assert order(backbone.bottom_up.res4) == with_blocks(BLOCKS[depth][1], res4)


def test_ten_blocks():
    assert len(insert_nonlocal(plain_backbone(50), ALL)) == 10


@pytest.mark.parametrize(
    "place, indices",
    [
        ("res4.0", [0]),
        ("res4.5", [5]),
        ("res4.-1", [5]),
        ("res4.-6", [0]),
        ("res4.:2", [0, 1]),
        ("res4.4:", [4, 5]),
        ("res4.-2:", [4, 5]),
        ("res4.4:99", [4, 5]),
        ("res4.1:-1:3", [1, 4]),
        ("res4.::-2", [1, 3, 5]),
        ("res4.:", range(6)),
        ("res4.*", range(6)),
    ],
)
def test_grammar(place, indices):
    backbone = plain_backbone()
    insert_nonlocal(backbone, place)
    assert order(backbone.bottom_up.res4) == with_blocks(6, indices)


@pytest.mark.parametrize(
    "location, message",
    [
        ([], "location is empty.*try 'res4.-2'"),
        (
            "res9.0",
            r"'res9.0' names no stage.*there are: bottom_up.res2, bottom_up.res3, bott.*res5$",
        ),
        ("bottom_up.0", "'bottom_up.0' names no stage"),
        ("res4.6", "'res4.6' is out of range: bottom_up.res4 has 6 .* 0 to 5 or -6 to -1"),
        ("res4.-7", "'res4.-7' is out of range: .* 0 to 5 or -6 to -1"),
        ("res4.6:", "'res4.6:' is out of range: .* 0 to 5 or -6 to -1"),
        ("res4.3:3", "'res4.3:3' is out of range"),
        ("", "'' is malformed.*'res4.-2'.*'res3.1::2'.*'res4.*'"),
        ("res4", "'res4' is malformed"),
        ("res4.", "'res4.' is malformed"),
        ("res4.last", "'res4.last' is malformed"),
        ("res4.1.5", "'res4.1.5' is malformed"),
        ("res4.1:2:3:4", "'res4.1:2:3:4' is malformed"),
        ("res4.--1:", "'res4.--1:' has a malformed slice"),
        ("res4.::0", "'res4.::0' has a malformed slice.*zero"),
        ([4], "4 is malformed"),
        (["res4.4", "res4.4"], "'res4.4': there is already a .* block 4 of bottom_up.res4"),
        (["res4.4", "res4.-2"], "'res4.-2': there is already a .* block 4 of bottom_up.res4"),
        (["res4.0", "res4.*"], r"'res4.\*': there is already a .* block 0 of bottom_up.res4"),
        ("res2.0", "'res2.0' lies in a frozen stage, bottom_up.res2.*FREEZE_AT"),
    ],
    ids=str,
)
def test_bad_place(location, message):
    check_error_and_no_change(location, {}, message)
    if isinstance(location, str):  # nor is anything done about the good ones beside it
        check_error_and_no_change(["res3.0", location, "res5.0"], {}, message)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"instantiation": "softmax"}, "instantiation 'softmax'.*'concatenation'"),
        ({"subsample": "avg"}, "subsample 'avg'.*'pool_conv'"),
        ({"norm": "FrozenBN"}, "norm 'FrozenBN'.*'GN'"),
        ({"reduction": 3}, "reduction 3.*1024"),
    ],
    ids=str,
)
def test_bad_option(options, message):
    check_error_and_no_change(["res4.0", "res4.1"], options, message)


def check_error_and_no_change(location, options, message):
    backbone = plain_backbone()
    names = [name for name, _ in backbone.named_modules()]
    with pytest.raises(ValueError, match=message):
        insert_nonlocal(backbone, location, **options)
    assert [name for name, _ in backbone.named_modules()] == names


def test_misspelt_option():
    with pytest.raises(TypeError, match="sub_sample"):
        insert_nonlocal(plain_backbone(), "res4.0", sub_sample="none")


def test_second_insertion():
    backbone = plain_backbone()
    insert_nonlocal(backbone, "res4.4")
    first = backbone.bottom_up.res4.nonlocal4
    with pytest.raises(ValueError, match="'res4.-2': there is already"):
        insert_nonlocal(backbone, "res4.-2")
    insert_nonlocal(backbone, ["res4.1", "res4.-1"])
    assert order(backbone.bottom_up.res4) == with_blocks(6, [1, 4, 5])
    assert backbone.bottom_up.res4.nonlocal4 is first


def test_stage_of_two_backbones():
    models = nn.ModuleDict({"left": plain_backbone(18), "right": plain_backbone(18)})
    with pytest.raises(ValueError, match="'res4.0' names several stages.*left.bott.*right.bott"):
        insert_nonlocal(models, "res4.0")
    assert insert_nonlocal(models["left"], "res4.0") == ["bottom_up.res4.nonlocal0"]


def test_model_without_stages():
    with pytest.raises(ValueError, match="names no stage of this model; stages there are: none"):
        insert_nonlocal(nn.Sequential(nn.Conv2d(1, 1, 1)), "res4.0")


def test_stage_that_is_not_frozen_any_more():
    backbone = backbone_without_weights(zoo_config("MODEL.BACKBONE.FREEZE_AT", 0, depth=18))
    insert_nonlocal(backbone, "res2.*")
    assert order(backbone.bottom_up.res2) == with_blocks(2, [0, 1])


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("LOCATION", (), "MODEL.NONLOCAL.LOCATION is empty"),
        ("LOCATION", ("res9.0",), "MODEL.NONLOCAL.LOCATION 'res9.0' names no stage"),
        ("LOCATION", ("res2.0",), "MODEL.NONLOCAL.LOCATION 'res2.0' lies in a frozen stage"),
        ("LOCATION", ("res4.4", "res4.-2"), "MODEL.NONLOCAL.LOCATION 'res4.-2': there is already"),
        (
            "INSTANTIATION",
            "mean",
            "MODEL.NONLOCAL.INSTANTIATION 'mean' is unknown; valid: 'gaussian'",
        ),
        ("SUBSAMPLE", "pool", "MODEL.NONLOCAL.SUBSAMPLE 'pool' is unknown; valid: 'none'"),
        ("NORM", "LN", "MODEL.NONLOCAL.NORM 'LN' is unknown; valid: '', 'BN'"),
        ("NORM", "FrozenBN", "MODEL.NONLOCAL.NORM 'FrozenBN' cannot be learned"),
        ("REDUCTION", 0, "MODEL.NONLOCAL.REDUCTION 0 must be positive"),
        (
            "BACKBONE",
            "build_resnet",
            "MODEL.NONLOCAL.BACKBONE 'build_resnet' is not.*resnet_fpn_back",
        ),
        (
            "BACKBONE",
            "build_nonlocal_backbone",
            "MODEL.NONLOCAL.BACKBONE is 'build_nonlocal_backbone'",
        ),
    ],
    ids=str,
)
def test_bad_config(option, value, message):
    with pytest.raises(ValueError, match=message):
        backbone_without_weights(
            zoo_config(
                *("MODEL.BACKBONE.NAME", "build_nonlocal_backbone"),
                *(f"MODEL.NONLOCAL.{option}", value),
            )
        )


def test_every_key_reaches_the_block():
    options = {
        "LOCATION": ("res3.0", "res5.-1"),
        "INSTANTIATION": "concatenation",
        "REDUCTION": 4,
        "SUBSAMPLE": "conv_pool",
        "NORM": "GN",
    }
    keys = [item for key, value in options.items() for item in (f"MODEL.NONLOCAL.{key}", value)]
    name = ("MODEL.BACKBONE.NAME", "build_nonlocal_backbone")
    bottom_up = backbone_without_weights(zoo_config(*name, *keys)).bottom_up
    for block, channels in ((bottom_up.res3.nonlocal0, 512), (bottom_up.res5.nonlocal2, 2048)):
        assert block.in_channels == channels
        assert block.bottleneck_channels == channels // 4
        assert (block.instantiation, block.subsample) == ("concatenation", "conv_pool")
        assert isinstance(block.out.norm, nn.GroupNorm)
    for scale, expected in ((True, 512**-0.5), (False, 1)):
        cfg = zoo_config(*name, "MODEL.NONLOCAL.SCALE", scale)
        assert backbone_without_weights(cfg).bottom_up.res4.nonlocal4.scale == expected


def test_block_joins_the_stage_as_it_is():
    """Its device, type and mode; and its own parameters learn."""
    backbone = plain_backbone(18).to(torch.bfloat16).eval()
    insert_nonlocal(backbone, "res4.0", norm="BN")
    block = backbone.bottom_up.res4.nonlocal0
    assert not block.training and not block.out.norm.training
    for parameter in block.parameters():
        assert parameter.device.type == "meta"
        assert parameter.dtype == torch.bfloat16
        assert parameter.requires_grad


ZOO_MODELS = {
    "fpn": ({}, ["res3.-2", "res4.-2"], "backbone.bottom_up"),
    "resnext": (
        {"name": "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml"},
        ["res4.-2"],
        "backbone.bottom_up",
    ),
    "retinanet": (
        {"name": "COCO-Detection/retinanet_R_50_FPN_1x.yaml"},
        ["res4.-2", "res5.0"],
        "backbone.bottom_up",
    ),
    "panoptic": (
        {"name": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"},
        ["res4.-2"],
        "backbone.bottom_up",
    ),
    "c4": ({"name": C4}, ["res3.0", "res4.-2"], "backbone"),
    "dc5": ({"name": DC5}, ["res4.-2", "res5.-2"], "backbone"),
}


@pytest.mark.parametrize("config, location, prefix", ZOO_MODELS.values(), ids=ZOO_MODELS)
def test_models_of_the_zoo(config, location, prefix, report):
    """The blocks run, every old name stays, and what is logged is what a block really gets."""
    model = model_without_weights(zoo_config(**config))
    check_insertion(model, model.backbone, location, prefix, report)


def test_regnet(report):
    model = regnet().to("meta")
    check_insertion(model, model, ["s1.0", "s2.*", "s3.-2", "s4.-1"], "", report)


def check_insertion(model, backbone, location, prefix, report):
    modules = dict(model.named_modules())
    names = insert_nonlocal(model, location)
    now = dict(model.named_modules())
    assert {n: m for n, m in now.items() if ".nonlocal" not in n} == modules
    assert {n.rpartition(".")[0].rpartition(".")[0] for n in names} == {prefix}

    sizes = {}
    for name in names:
        assert isinstance(now[name], NonLocalBlock)
        now[name].register_forward_hook(
            lambda block, inputs, _, name=name: sizes.update({name: inputs[0].shape[2:]})
        )
    backbone(torch.empty(1, 3, 800, 1344, device="meta"))
    assert len(report) == len(names)
    for name, message in zip(names, report):
        parameters = sum(p.numel() for p in now[name].parameters())
        multiply_adds = now[name].multiply_adds(*sizes[name])
        assert message == (
            f"{name}: embedded_gaussian, {parameters:,} parameters, "
            f"{multiply_adds / 1e9:.2f} G multiply-adds at 800x1344"
        )


def test_report_at_the_papers_place(report):
    insert_nonlocal(plain_backbone(), "res4.-2", instantiation="dot_product", subsample="none")
    insert_nonlocal(plain_backbone(), "res4.-2")
    # theta, phi, g and W_z, each 1024 * 512; the operation as test_nonlocal_block counts it.
    parameters = 4 * 1024 * 512 + 3 * 512 + 1024
    multiply_adds = 2 * (4200 + 1050) * 1024 * 512 + 2 * 4200 * 1050 * 512
    assert (parameters, multiply_adds) == (2_099_712, 10_020_864_000)
    assert report == [
        "bottom_up.res4.nonlocal4: dot_product, 2,099,712 parameters, "
        "11.01 G multiply-adds at 800x1344",
        "bottom_up.res4.nonlocal4: embedded_gaussian, 2,099,712 parameters, "
        "10.02 G multiply-adds at 800x1344",
    ]


def test_res5_of_a_c4_model_is_in_its_head(report):
    cfg = zoo_config(name=C4)
    model = model_without_weights(cfg)
    assert insert_nonlocal(model, "res5.-2") == ["roi_heads.res5.nonlocal1"]
    assert order(model.roi_heads.res5) == with_blocks(3, [1])
    regions = torch.empty(5, 1024, 14, 14, device="meta")
    assert model.roi_heads.res5(regions).shape == (5, 2048, 7, 7)
    assert "800x1344" not in report[0]  # it sees regions, not the image
    with pytest.raises(ValueError, match="'res5.-2' names no stage.*there are: res2, res3, res4$"):
        insert_nonlocal(backbone_without_weights(cfg), "res5.-2")


def test_deformable_stage_is_left_alone():
    try:
        model = model_without_weights(zoo_config(name=DEFORMABLE))
    except ImportError as error:  # upstream does not even build one without its C++ operators
        pytest.skip(str(error))
    stage = model.backbone.bottom_up.res4
    deformable = list(stage.children())
    assert {type(block).__name__ for block in deformable} == {"DeformBottleneckBlock"}
    insert_nonlocal(model, "res4.-2")
    assert list(stage.children()) == [*deformable[:5], stage.nonlocal4, deformable[5]]
    assert model.backbone.bottom_up.stages[2] is stage


def test_regnet_runs_the_blocks_where_they_are():
    model = regnet()
    x = torch.randn(1, 3, 32, 48)
    model.eval()
    plain = model(x)
    insert_nonlocal(model, ["s2.0", "s3.-2"])
    assert order(model.s2)[:2] == ["b1", "nonlocal0"]
    for name, feature in model(x).items():
        assert torch.equal(feature, plain[name])
    nn.init.ones_(model.s2.nonlocal0.out.bias)
    changed = {name: not torch.equal(f, plain[name]) for name, f in model(x).items()}
    assert changed == {"s1": False, "s2": True, "s3": True, "s4": True}
