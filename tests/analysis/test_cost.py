"""fvcore with our handles, and tools/analyze_cost.py, against counts by hand."""

import copy
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_backbone
from fvcore.nn import FlopCountAnalysis
from matplotlib.image import imread

from nl_detectron import NonLocalBlock, get_config_file, insert_nonlocal
from nl_detectron.analysis import FLOP_HANDLES, analyze_cost, count_multiply_adds
from nl_detectron.engine import load_config
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
MASK_RCNN_R50_NL = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_NL_1x.yaml"


def fvcore_multiply_adds(module, x):
    """What fvcore counts, norm and up-sampling left out."""
    analysis = FlopCountAnalysis(module, x).set_op_handle(**FLOP_HANDLES)
    analysis.set_op_handle("aten::batch_norm", None)
    analysis.set_op_handle("aten::upsample_nearest2d", None)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.total()


def by_hand(instantiation, subsample, c, d, n, m):
    """N positions, the M of them that are left, C channels and D inner ones; as traced.

    Untraced, the Gaussian values are not padded to the keys' width, and the dot product takes the
    cheaper association where that is N x M.
    """
    source = m if subsample == "pool_conv" else n
    g_and_out = source * c * d + n * d * c
    theta_and_phi = n * c * d + source * c * d
    if instantiation == "gaussian":
        return g_and_out + n * m * (c + c)
    if instantiation == "embedded_gaussian":
        return g_and_out + theta_and_phi + n * m * (d + d)
    if instantiation == "dot_product":
        return g_and_out + theta_and_phi + m * d * d + n * d * d
    return g_and_out + theta_and_phi + (n * d + m * d) + (n * d + m * d)


@pytest.mark.parametrize(
    "space, pooled",
    [((1, 1), 1), ((1, 9), 5), ((5, 7), 12), ((12, 16), 48), ((13,), 7), ((3, 5, 4), 18)],
    ids=str,
)
@pytest.mark.parametrize("subsample", SUBSAMPLES)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_fvcore_counts_a_block(instantiation, subsample, space, pooled):
    block = NonLocalBlock(24, instantiation=instantiation, subsample=subsample, reduction=3)
    n = math.prod(space)
    m = n if subsample == "none" else pooled
    count = by_hand(instantiation, subsample, 24, 8, n, m)
    assert fvcore_multiply_adds(block, torch.randn(2, 24, *space)) == 2 * count
    small = instantiation == "dot_product" and 2 * n * m < (n + m) * 8
    if instantiation != "gaussian" and not small:
        assert block.multiply_adds(*space) == count


def backbone(*options):
    cfg = load_config(TINY, ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", *options])
    return build_backbone(cfg).eval()


def test_fvcore_counts_a_backbone_with_blocks():
    x = torch.randn(1, 3, 96, 160)
    plain = fvcore_multiply_adds(backbone(), x)
    with_blocks = backbone()
    insert_nonlocal(with_blocks, ["res3.1::2", "res4.1::2"])
    blocks = [*[NonLocalBlock(32).multiply_adds(12, 20)] * 2]
    blocks += [*[NonLocalBlock(64).multiply_adds(6, 10)] * 3]
    assert fvcore_multiply_adds(with_blocks, x) == plain + sum(blocks)


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_costs_are_those_of_the_model_with_such_a_block(instantiation):
    """At a size that is padded from odd sides to 96x160, in every stage."""
    options = ["MODEL.NONLOCAL.INSTANTIATION", instantiation]
    (model,), blocks = analyze_cost(load_config(TINY, options), [(65, 129)])
    assert [(b.stage, b.subsample) for b in blocks] == [
        (f"res{i}", subsample) for i in (2, 3, 4, 5) for subsample in SUBSAMPLES
    ]
    x = torch.randn(1, 3, 96, 160)
    plain = backbone()
    plain_count = count_multiply_adds(plain, x)
    inputs = []
    for block in blocks:
        with_block = copy.deepcopy(plain)
        (name,) = insert_nonlocal(
            with_block, f"{block.stage}.0", instantiation=instantiation, subsample=block.subsample
        )
        inserted = with_block.get_submodule(name)
        inserted.register_forward_pre_hook(lambda _, args: inputs.extend(args))
        extra = count_multiply_adds(with_block, x) - plain_count
        matrix = inserted.affinity_matrix(inputs[-1])
        assert block.parameters == sum(p.numel() for p in inserted.parameters())
        assert block.channels == inputs[-1].shape[1]
        assert (block.positions, block.keys) == matrix.shape[1:]
        assert block.affinity_bytes == matrix.nbytes
        assert block.multiply_adds == extra
        assert block.share == block.multiply_adds / model.multiply_adds
    default = next(b for b in blocks if (b.stage, b.subsample) == ("res4", "pool_conv"))
    assert (model.blocks, model.added_parameters) == (1, default.parameters)
    assert model.added_multiply_adds == default.multiply_adds


def test_one_block_adds_less_than_five_percent():
    """The paper's claim, of the defaults, at two sizes; and the cost by hand at 800x1344."""
    cfg = load_config(get_config_file(MASK_RCNN_R50_NL))
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
    assert res4["none"].affinity_bytes == 4 * n * n
    assert models[0].added_multiply_adds == res4["pool_conv"].multiply_adds
    assert models[0].added_parameters == 4 * conv + 3 * 512 + 1024


def analyze(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "analyze_cost.py"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_tool_writes_tables_and_chart(tmp_path):
    sizes = ["--size", "64x96", "--size", "65x97"]
    run = analyze(tmp_path, "--config-file", TINY, *sizes, "--output", "out")
    assert run.returncode == 0, run.stderr
    models, blocks = analyze_cost(load_config(TINY), [(64, 96), (65, 97)])
    assert (tmp_path / "out" / "cost.md").read_text() == run.stdout
    records = json.loads((tmp_path / "out" / "cost.json").read_text())
    assert records == {"models": [vars(m) for m in models], "blocks": [vars(b) for b in blocks]}
    with open(tmp_path / "out" / "cost.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{key: str(value) for key, value in vars(b).items()} for b in blocks]
    lines = [line for line in run.stdout.splitlines() if "| res" in line]
    for line, block in zip(lines, blocks, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:2] == [f"{block.height}x{block.width}", block.stage]
        assert cells[5] == f"{block.parameters:,}" and cells[7] == f"{block.share:.2%}"
    image = imread(tmp_path / "out" / "cost.png")
    assert image.shape[0] > 500 and image.std() > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "no.yaml"], "--config-file: no file"),
        (["--config-file", TINY, "--size", "64"], "'64' is not HEIGHTxWIDTH, such as 800x1344"),
        (
            ["--config-file", TINY, "MODEL.NONLOCAL.REDUCTON", "2"],
            "did you mean MODEL.NONLOCAL.RED",
        ),
        (["--config-file", TINY, "MODEL.NONLOCAL.REDUCTION", "3"], "MODEL.NONLOCAL.REDUCTION 3"),
        (["--config-file", TINY, "MODEL.BACKBONE.NAME", "x"], "'x' is not registered"),
    ],
    ids=str,
)
def test_tool_names_what_is_wrong(arguments, message, capsys, monkeypatch):
    import analyze_cost as tool

    monkeypatch.setattr(sys, "argv", ["analyze_cost.py", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        tool.main()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
