"""The cost of blocks in a model, and tools/analyze_cost.py."""

import copy
import math

import analyze_cost as tool
import pytest
import torch
from fvcore.nn import parameter_count
from helpers import TINY, zoo_config

from nl_detectron import insert_nonlocal
from nl_detectron.analysis import analyze_cost, count_multiply_adds, meta_model
from nl_detectron.engine import load_config
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_costs_equal_those_of_a_model_with_that_block(instantiation):
    """In every stage, at a size that is padded from 65x129 to 96x160."""
    options = ["MODEL.NONLOCAL.INSTANTIATION", instantiation]
    (baseline, model), blocks = analyze_cost(load_config(TINY, options), [(65, 129)])
    names = [(f"res{i}", subsample) for i in (2, 3, 4, 5) for subsample in SUBSAMPLES]
    assert [(block["stage"], block["sub-sampling"]) for block in blocks] == names
    x = torch.zeros(1, 3, 96, 160, device="meta")
    plain = meta_model(load_config(TINY, ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]))
    plain_count = count_multiply_adds(plain.backbone, x)
    for (stage, subsample), block in zip(names, blocks):
        backbone = copy.deepcopy(plain.backbone)
        options = {"instantiation": instantiation, "subsample": subsample}
        (name,) = insert_nonlocal(backbone, f"{stage}.0", **options)
        inserted = backbone.get_submodule(name)
        assert block["channels"] == inserted.in_channels
        assert block["parameters"] == parameter_count(inserted)[""]
        assert block["GMAC"] == (count_multiply_adds(backbone, x) - plain_count) / 1e9
        assert block["% of the model"] == pytest.approx(100 * block["GMAC"] / baseline["GMAC"])
        step = 2 ** int(stage[-1])
        n, m = 96 // step * 160 // step, math.ceil(48 / step) * math.ceil(80 / step)
        m = n if subsample == "none" else m
        assert (block["positions"], block["affinity (MiB)"]) == (n, 4 * n * m / 2**20)
    default = blocks[names.index(("res4", "pool_conv"))]
    assert (baseline["blocks"], model["blocks"]) == (0, 1)
    for key in ("parameters", "GMAC"):
        assert model[key] - baseline[key] == pytest.approx(default[key])


def test_one_block_adds_less_than_five_percent():
    """The paper's claim, for the default block, and the cost by hand at 800x1344."""
    _, blocks = analyze_cost(zoo_config(), [(800, 1344)])
    res4 = {block["sub-sampling"]: block for block in blocks if block["stage"] == "res4"}
    assert 0 < res4["pool_conv"]["% of the model"] < 5
    n, m, conv = 50 * 84, 25 * 42, 1024 * 512
    assert {subsample: block["GMAC"] for subsample, block in res4.items()} == {
        "none": (4 * n * conv + 2 * n * n * 512) / 1e9,
        "conv_pool": (4 * n * conv + 2 * n * m * 512) / 1e9,
        "pool_conv": (2 * (n + m) * conv + 2 * n * m * 512) / 1e9,
    }
    assert res4["pool_conv"]["parameters"] == 4 * conv + 3 * 512 + 1024


@pytest.mark.parametrize(
    "arguments, message",
    [("--size 64", "'64' is not HEIGHTxWIDTH"), ("MODEL.NONLOCAL.REDUCTION 3", "REDUCTION 3 must")],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        tool.main(["--config-file", TINY, *arguments.split()])
    assert message in capsys.readouterr().err
