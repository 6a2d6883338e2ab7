"""Competitors compute the same function, and the tables follow from the measured rows."""

import json
import shutil
from functools import partial
from pathlib import Path

import benchmark
import pytest
import torch
from nl_benchmark import competitors
from nl_benchmark.report import table
from nl_benchmark.timing import check_agreement, measure, paired_ratio, peak_bytes

from nl_detectron import get_config_file
from nl_detectron.engine import load_config
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES

SHAPE = (2, 16, 6, 8)
BLOCKS = [*((function, "") for function in INSTANTIATIONS), ("embedded_gaussian", "BN")]
FEW_PROPOSALS = ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.RPN.POST_NMS_TOPK_TEST", 20)


@pytest.mark.parametrize("function", INSTANTIATIONS)
def test_operations_agree(function):
    forms = competitors.operations(function, SHAPE, torch.float64, "cpu")
    for pass_name in ("forward", "forward+backward"):
        matrix, ours = forms["matrix"][pass_name](), forms["nl_detectron"][pass_name]()
        torch.testing.assert_close(ours, matrix, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("subsample", SUBSAMPLES)
@pytest.mark.parametrize("function, norm", BLOCKS)
def test_blocks_agree(function, norm, subsample):
    libraries = {("", "none"): ["mmcv"], ("", "conv_pool"): ["mmcv"], ("BN", "none"): ["timm"]}
    others = [pytest.importorskip(n).__name__ for n in libraries.get((norm, subsample), [])]
    blocks = competitors.blocks(function, norm, subsample, SHAPE, torch.float64, "cpu")
    assert list(blocks) == ["matrix", "nl_detectron", *others]
    for name in ["nl_detectron", *others]:
        for pass_name, call in blocks[name].items():
            if (name, function, pass_name) == ("mmcv", "concatenation", "forward+backward"):
                with pytest.raises(RuntimeError):  # it divides the ReLU's output in place
                    call()
            else:
                expected = blocks["matrix"][pass_name]()
                torch.testing.assert_close(call(), expected, rtol=1e-9, atol=1e-9)


def test_disagreement_is_an_error():
    def returning(value):
        return {"forward": lambda: [torch.tensor(value, dtype=torch.float64)]}

    check_agreement({"a": returning(1), "b": returning(1 + 1e-10)})
    with pytest.raises(AssertionError, match="b differs in forward"):
        check_agreement({"a": returning(1), "b": returning(1 + 1e-8)})


def test_competitors_run_in_turn_and_failures_are_rows():
    order = []
    calls = {
        "a": lambda: order.append("a") or [torch.ones(10)],
        "too large": lambda: [torch.empty(2**50)],
        "b": lambda: order.append("b") or [torch.ones(1)],
    }
    a, failed, b = measure({name: {"forward": calls[name]} for name in calls}, 3, "cpu")
    turns = [name for i, name in enumerate(order) if order[i - 1 : i] != [name]]
    assert turns == ["a", "b"] * 4  # the warm-up and three rounds
    assert (a["competitor"], a["pass"], len(a["seconds"])) == ("a", "forward", 3)
    assert (a["peak_bytes"], b["peak_bytes"]) == (40, 4)
    assert failed["failure"].startswith("RuntimeError: ") and failed["seconds"] == []


def test_matrix_is_in_the_peak():
    pair = competitors.operations("dot_product", (1, 8, 16, 32), torch.float32, "cpu")
    matrix, ours = (peak_bytes(passes["forward"], "cpu") for passes in pair.values())
    assert 4 * 512**2 < matrix < 1.1 * 4 * 512**2 and ours < 0.1 * 4 * 512**2  # N x N floats


@pytest.mark.parametrize(
    "seconds, text",
    [
        ([2.25, 4.5, 6.0, 8.5, 10.625], "2.12 (2.12 to 2.25)"),  # the ratio of the medians is 2
        ([1.0, 3.5, 6.0, 8.6, 45.0], "2 (1.75 to 2.15)"),  # a spread of exactly 20%
        ([1.0, 3.5, 6.0, 9.0, 45.0], "unstable (spread 25%)"),
        ([2.0] * 4, "unstable (fewer than 5 rounds)"),
    ],
)
def test_ratio_is_paired_and_stable_or_refused(seconds, text):
    assert paired_ratio(seconds, [1.0, 2.0, 3.0, 4.0, 5.0][: len(seconds)]) == text


def test_readme_shows_the_results(tmp_path):
    readme = benchmark.PROJECT / "README.md"
    copied = Path(shutil.copy(readme, tmp_path))
    benchmark.main(["report", "--readme", str(copied)])
    assert copied.read_bytes() == readme.read_bytes()


MODEL = "model --locations res4.-2 --subsamples none --image-size 64 96"
MODEL = pytest.param(MODEL, 4, marks=pytest.mark.slow)
BLOCK = ("block --size 4 2 3 --subsample pool_conv", 20)


@pytest.mark.parametrize("arguments, rows", [("op --size 4 2 3", 16), BLOCK, MODEL])
def test_script(arguments, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nl_benchmark.timing.MIN_SECONDS", 1e-9)
    monkeypatch.setattr(competitors, "load_config", partial(load_config, overrides=FEW_PROPOSALS))
    output = tmp_path / "results.json"
    benchmark.main([*arguments.split(), "--rounds", "1", "--output", str(output)])
    results = json.loads(output.read_text())
    assert results["command"].startswith(f"projects/benchmark/benchmark.py {arguments} ")
    assert len(results["rows"]) == rows
    assert all(row["seconds"] and row["peak_bytes"] > 0 for row in results["rows"])
    assert capsys.readouterr().out == table(results["rows"]) + "\n"


def test_locations_are_those_of_the_configs():
    for blocks, location in zip(["", "5_blocks_", "10_blocks_"], benchmark.PAPER):
        name = f"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_NL_{blocks}1x.yaml"
        assert list(load_config(get_config_file(name)).MODEL.NONLOCAL.LOCATION) == location
