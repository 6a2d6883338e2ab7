"""Competitors compute the same function, and the tables follow from the measured rows."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import benchmark
import gpu
import pytest
import torch
from nl_benchmark import competitors
from nl_benchmark.report import table
from nl_benchmark.timing import check_agreement, measure, paired_ratio, peak_bytes

from nl_detectron import NonLocalBlock, get_config_file
from nl_detectron.engine import load_config
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES

FEW_PROPOSALS = ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.RPN.POST_NMS_TOPK_TEST", 20)


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
    pair = competitors.operations("dot_product", "none", (1, 8, 16, 32), torch.float32, "cpu")
    matrix, ours, _ = (peak_bytes(passes["forward"], "cpu") for passes in pair.values())
    assert 4 * 512**2 < matrix < 1.1 * 4 * 512**2 and ours < 0.1 * 4 * 512**2  # N x N floats


@pytest.mark.parametrize(
    "ratios, text",
    [
        ([2.0, 1.0], "1.5 (1 to 2)"),
        ([5, 1, 3, 2, 4], "3 (1 to 5)"),
        (range(1, 7), "3.5 (1 to 6)"),  # 6 rounds: 2 / 2^6 = 3% of the time it misses the median
        (range(1, 9), "4.5 (1 to 8)"),
        (range(1, 10), "5 (2 to 8)"),
        (range(1, 16), "8 (4 to 12)"),
    ],
)
def test_ratio_is_paired(ratios, text):
    reference = [2.0**i for i in range(len(ratios))]  # each round is slower than the one before
    assert paired_ratio([a * b for a, b in zip(ratios, reference)], reference) == text


@pytest.mark.parametrize("subsample", SUBSAMPLES)
@pytest.mark.parametrize("function", INSTANTIATIONS)
def test_floor_has_the_products_of_the_block(function, subsample):
    block = NonLocalBlock(64, instantiation=function, subsample=subsample)
    count = sum(math.prod(size) for size in competitors.block_products(block, 5, 6))
    if function == "concatenation":  # products with w_f and of rows, which are no matrix products
        count += 2 * (30 + (30 if subsample == "none" else 9)) * 32
    assert count == block.multiply_adds(5, 6)


def test_readme_shows_the_results(tmp_path):
    readme = benchmark.PROJECT / "README.md"
    copied = Path(shutil.copy(readme, tmp_path))
    benchmark.main(["report", "--readme", str(copied)])
    assert copied.read_bytes() == readme.read_bytes()


OP, BLOCK = "op --size 4 2 3", "block --size 4 2 3"
MODEL = "model --locations res4.-2 --subsamples none --image-size 64 96"
MODEL = pytest.param(MODEL, 4, marks=pytest.mark.slow)


@pytest.mark.parametrize("arguments, rows", [(OP, 44), (BLOCK, 108), MODEL])
def test_script(arguments, rows, tmp_path, capsys, monkeypatch):
    """The script itself compares the competitors' results and gradients in float64."""
    if arguments.startswith("block"):
        pytest.importorskip("mmcv"), pytest.importorskip("timm")
    monkeypatch.setattr("nl_benchmark.timing.MIN_SECONDS", 1e-9)
    monkeypatch.setattr(competitors, "load_config", partial(load_config, overrides=FEW_PROPOSALS))
    monkeypatch.setattr(benchmark, "limit_memory", lambda: None)  # it would last
    output = tmp_path / "results.json"
    benchmark.main([*arguments.split(), "--rounds", "1", "--output", str(output)])
    results = json.loads(output.read_text())
    assert results["command"].startswith(f"projects/benchmark/benchmark.py {arguments} ")
    assert len(results["rows"]) == rows
    for row in results["rows"]:
        if not row["seconds"]:  # mmcv changes the output of the ReLU, which it needs, in place
            assert (row["competitor"], row["facts"]["function"]) == ("mmcv", "concatenation")
    assert capsys.readouterr().out == table(results["rows"]) + "\n"


def test_locations_are_those_of_the_configs():
    for blocks, location in zip(["", "5_blocks_", "10_blocks_"], benchmark.PAPER):
        name = f"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_NL_{blocks}1x.yaml"
        assert list(load_config(get_config_file(name)).MODEL.NONLOCAL.LOCATION) == location


@pytest.mark.slow
def test_gpu_script(tmp_path, monkeypatch):
    monkeypatch.setattr("nl_benchmark.timing.MIN_SECONDS", 1e-9)
    monkeypatch.setattr(competitors, "load_config", partial(load_config, overrides=FEW_PROPOSALS))
    monkeypatch.setattr(benchmark, "limit_memory", lambda: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    gpu.main(["--quick", "--device", "cpu", "--rounds", "1", "--output", str(tmp_path)])
    files = {file.stem: json.loads(file.read_text())["rows"] for file in tmp_path.iterdir()}
    errors, kernels, models = (files[f"{p}_0"] for p in ("correctness", "kernels", "models"))
    assert len(errors) == 4 * 3 * 4 + 2
    for row in errors:
        # The gradient of Eq. 5 has a step where the ReLU begins.
        limit = 500 if row["facts"]["function"] == "concatenation" else 50
        assert all(error < limit for error in row["errors"])
    assert all(row["seconds"] for row in kernels + models)
    assert [row["competitor"] for row in models] == ["baseline", "+1 NL, pool_conv"] * 2
