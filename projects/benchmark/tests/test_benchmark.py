"""Competitors compute the same function, and the tables follow from the measured rows."""

import json
import math
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import benchmark
import gpu
import pytest
import torch
from nl_benchmark import competitors
from nl_benchmark.gpu_kernels import torch_attention
from nl_benchmark.measurement import measure, paired_ratio, table, write_tables

from nl_detectron import NonLocalBlock, layers
from nl_detectron.engine import load_config
from nl_detectron.layers import INSTANTIATIONS, SUBSAMPLES

FEW_PROPOSALS = ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.RPN.POST_NMS_TOPK_TEST", 20)


def test_competitors_run_in_turn_and_failures_are_rows():
    order = []
    calls = {
        "a": lambda: order.append("a") or [torch.ones(10)],
        "too large": lambda: [torch.empty(2**50)],
        "other result": lambda: [torch.full((10,), 1.001)],
        "b": lambda: order.append("b") or [torch.full((10,), 1.0001)],
    }
    passes = {name: {"forward": call} for name, call in calls.items()}
    a, large, other, b = measure(passes, 3, "cpu")
    turns = [name for i, name in enumerate(order) if order[i - 1 : i] != [name]]
    assert turns == ["a", "b"] * 4  # the warm-up and three rounds
    assert (a["competitor"], a["pass"], len(a["seconds"])) == ("a", "forward", 3)
    assert a["peak_bytes"] == b["peak_bytes"] == 40
    assert large["failure"].startswith("RuntimeError(") and large["seconds"] == []
    assert other["failure"] == "AssertionError('another result')" and other["seconds"] == []


def test_rows_of_a_pass_are_yielded_when_it_is_finished():
    passes, done = {}, []
    for name in ("forward", "forward+backward"):
        passes[name] = partial(lambda name: done.append(name) or [torch.ones(1)], name)
    rows = measure({"a": passes, "b": passes}, 1, "cpu")
    assert [next(rows)["competitor"], next(rows)["competitor"]] == ["a", "b"]
    assert set(done) == {"forward"}
    assert [row["pass"] for row in rows] == ["forward+backward"] * 2


@pytest.mark.parametrize(
    "ratios, text",
    [
        ([2.0, 1.0], "1.5 (1 to 2)"),
        (range(1, 7), "3.5 (1 to 6)"),  # 6 rounds: 2 / 2^6 = 3% of the time it misses the median
        (range(1, 10), "5 (2 to 8)"),
    ],
)
def test_ratio_is_paired(ratios, text):
    reference = [2.0**i for i in range(len(ratios))]  # each round is slower than the one before
    assert paired_ratio([a * b for a, b in zip(ratios, reference)], reference) == text


@pytest.mark.parametrize("subsample", SUBSAMPLES)
@pytest.mark.parametrize("function", INSTANTIATIONS)
def test_floor_has_the_products_of_the_block(function, subsample):
    block = NonLocalBlock(64, instantiation=function, subsample=subsample)
    convolutions, pairs = competitors.block_products(block, torch.empty(1, 64, 9, 10))
    count = sum(math.prod(size) for size in convolutions + pairs)
    n, m = 90, 90 if subsample == "none" else 25
    if function == "concatenation":  # products with w_f and of rows, which are no matrix products
        count += 2 * (n + m) * 32
    if function == "disentangled":  # the sum of g, which is a product of a vector and a matrix
        count += m * 32
    assert count == block.multiply_adds(9, 10)


def test_torch_attention():
    theta, phi, g = torch.randn(3, 2, 6, 4)
    expected = layers.embedded_gaussian_affinity(theta, phi, 0.5) @ g
    for name in ("math", "flash_attention"):
        torch.testing.assert_close(torch_attention(0.5)[name](theta, phi, g), expected)


def test_readme_shows_the_results(tmp_path):
    readme = benchmark.PROJECT / "README.md"
    copied = Path(shutil.copy(readme, tmp_path))
    write_tables(copied, benchmark.PROJECT / "results")
    assert copied.read_bytes() == readme.read_bytes()


def test_blocks(tmp_path, capsys, monkeypatch):
    """Blocks with other results than the matrix form would be failures."""
    pytest.importorskip("mmcv"), pytest.importorskip("timm")
    monkeypatch.setattr("nl_benchmark.measurement.MIN_SECONDS", 1e-9)
    arguments = ["block", "--size", "16", "6", "8", "--rounds", "1", "--output"]
    benchmark.main([*arguments, str(tmp_path / "results.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["command"].startswith("projects/benchmark/benchmark.py block --size 16 6 8 ")
    assert len(results["rows"]) == 122
    assert all(row["seconds"] for row in results["rows"])
    assert capsys.readouterr().out == table(results["rows"]) + "\n"


def test_rows_of_some_functions(tmp_path):
    arguments = ["op", "--size", "4", "2", "3", "--subsamples", "none", "--rounds", "1"]
    arguments += ["--functions", "dot_product", "concatenation", "--output"]
    benchmark.main([*arguments, str(tmp_path / "results.json")])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    found = [(row["facts"]["function"], row["competitor"]) for row in rows]
    dot_product = [("dot_product", name) for name in ("matrix", "nl_detectron", "torch.mm")]
    concatenation = [("concatenation", name) for name in ("matrix", "nl_detectron")]
    assert found == dot_product * 2 + concatenation * 2


@pytest.mark.slow
def test_a_stopped_run_leaves_the_finished_rows(tmp_path):
    file = tmp_path / "results.json"
    arguments = ["op", "--size", "4", "2", "3", "--rounds", "2", "--output", str(file)]
    process = subprocess.Popen([sys.executable, benchmark.__file__, *arguments])
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    rows = json.loads(file.read_text())["rows"]
    assert 0 < len(rows) < 84 and all(len(row["seconds"]) == 2 for row in rows)


@pytest.mark.slow
def test_gpu_script_runs_the_other_commands_after_a_failure(tmp_path, monkeypatch):
    command = "op --size 4 2 3 --subsamples none --functions dot_product"
    monkeypatch.setitem(gpu.QUICK, "kernels", [f"{command} --batch -1", command])
    arguments = ["--quick", "--device", "cpu", "--rounds", "1", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="--batch -1: exit status 1"):
        gpu.main([*arguments, "--parts", "kernels"])
    assert [file.name for file in tmp_path.iterdir()] == ["kernels_1.json"]
    assert len(json.loads((tmp_path / "kernels_1.json").read_text())["rows"]) == 6


@pytest.mark.slow
def test_quick_commands_of_the_gpu_script(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr("nl_benchmark.measurement.MIN_SECONDS", 1e-9)
    monkeypatch.setattr(competitors, "load_config", partial(load_config, overrides=FEW_PROPOSALS))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rows = {}
    for part, (command,) in gpu.QUICK.items():
        file = tmp_path / f"{part}.json"
        benchmark.main([*command.split(), "--rounds", "1", "--output", str(file)])
        rows[part] = json.loads(file.read_text())["rows"]
    errors, kernels, models, blocks = rows.values()
    assert len(errors) == len(INSTANTIATIONS) * 3 * 4 + 2
    for row in errors:
        # The gradients of the ReLU in Eq. 5 and of the maximum of conv_pool have steps.
        has_step = {"concatenation", "conv_pool"} & set(row["facts"].values())
        limit = 500 if has_step else 50
        assert all(error < limit for error in row["errors"])
    assert all(row["seconds"] for row in kernels + models + blocks)
    assert [row["competitor"] for row in models] == ["baseline", "+1 NL, pool_conv"] * 2
