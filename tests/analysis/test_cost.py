"""The cost of blocks in a model, and tools/analyze_cost.py."""

import copy
from pathlib import Path

import analyze_cost as tool
import pytest
import torch
from detectron2.modeling import build_backbone

from nl_detectron import get_config_file, insert_nonlocal
from nl_detectron.analysis import analyze_cost, count_multiply_adds
from nl_detectron.engine import load_config
from nl_detectron.errors import UserError
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES

TINY = str(Path(__file__).resolve().parents[1] / "mask_rcnn_tiny.yaml")


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_costs_equal_those_of_a_model_with_that_block(instantiation):
    """In every stage, at a size that is padded from 65x129 to 96x160."""
    options = ["MODEL.NONLOCAL.INSTANTIATION", instantiation]
    (model,), blocks = analyze_cost(load_config(TINY, options), [(65, 129)])
    assert [(b.stage, b.subsample) for b in blocks] == [
        (f"res{i}", subsample) for i in (2, 3, 4, 5) for subsample in SUBSAMPLES
    ]
    x = torch.randn(1, 3, 96, 160)
    cfg = load_config(TINY, ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"])
    plain = build_backbone(cfg).eval()
    plain_count = count_multiply_adds(plain, x)
    inputs = []
    for block in blocks:
        with_block = copy.deepcopy(plain)
        (name,) = insert_nonlocal(
            with_block, f"{block.stage}.0", instantiation=instantiation, subsample=block.subsample
        )
        inserted = with_block.get_submodule(name)
        inserted.register_forward_pre_hook(lambda _, args: inputs.extend(args))
        added = count_multiply_adds(with_block, x) - plain_count
        assert block.parameters == sum(p.numel() for p in inserted.parameters())
        assert block.channels == inputs[-1].shape[1]
        assert (block.positions, block.keys) == inserted.affinity_matrix(inputs[-1]).shape[1:]
        assert block.multiply_adds == added
        assert block.share == block.multiply_adds / model.multiply_adds
    default = next(b for b in blocks if (b.stage, b.subsample) == ("res4", "pool_conv"))
    assert (model.blocks, model.added_parameters) == (1, default.parameters)
    assert model.added_multiply_adds == default.multiply_adds


def test_one_block_adds_less_than_five_percent():
    """The paper's claim, for the default block, and the cost by hand at 800x1344."""
    cfg = load_config(get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_NL_1x.yaml"))
    models, blocks = analyze_cost(cfg, [(800, 1344), (640, 640)])
    for model in models:
        assert 0 < model.added_multiply_adds < 0.05 * model.multiply_adds
    res4 = {b.subsample: b for b in blocks if (b.stage, b.height) == ("res4", 800)}
    n, m, conv = 50 * 84, 25 * 42, 1024 * 512
    assert {name: block.multiply_adds for name, block in res4.items()} == {
        "none": 4 * n * conv + 2 * n * n * 512,
        "conv_pool": 4 * n * conv + 2 * n * m * 512,
        "pool_conv": 2 * (n + m) * conv + 2 * n * m * 512,
    }
    assert models[0].added_multiply_adds == res4["pool_conv"].multiply_adds
    assert models[0].added_parameters == 4 * conv + 3 * 512 + 1024


def test_a_backbone_without_stages_is_refused(monkeypatch):
    monkeypatch.setattr("nl_detectron.analysis.cost.find_stages", lambda backbone: [])
    with pytest.raises(UserError, match="MODEL.BACKBONE.NAME .* has no stages of residual blocks"):
        analyze_cost(load_config(TINY), [(64, 96)])


def test_tool(capsys):
    tool.main(["--config-file", TINY, "--size", "64x96", "--size", "65x97"])
    (_, total), blocks = analyze_cost(load_config(TINY), [(64, 96), (65, 97)])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "| 6" in line]
    assert rows[1][:3] == ["65x97", f"{total.parameters:,}", f"{total.multiply_adds / 1e9:.2f}"]
    for row, block in zip(rows[2:], blocks, strict=True):
        assert row[:4] == [
            f"{block.height}x{block.width}",
            block.stage,
            str(block.channels),
            block.subsample,
        ]
        assert row[5] == f"{block.parameters:,}" and row[7] == f"{block.share:.2%}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "no.yaml"], "--config-file: no file"),
        (["--config-file", TINY, "--size", "64"], "'64' is not HEIGHTxWIDTH, such as 800x1344"),
        (["--config-file", TINY, "MODEL.NONLOCAL.REDUCTON", "2"], "did you mean MODEL.NONLOCAL.RE"),
        (["--config-file", TINY, "MODEL.NONLOCAL.REDUCTION", "3"], "MODEL.NONLOCAL.REDUCTION 3"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        tool.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
