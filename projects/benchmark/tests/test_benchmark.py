"""The bench: that competitors compute the same, and that what it prints follows from its times."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from nl_detectron.analysis.benchmark.block import block_cases
from nl_detectron.analysis.benchmark.competitors import mmcv_block, timm_block
from nl_detectron.analysis.benchmark.model import PLACES, model_cases, model_config
from nl_detectron.analysis.benchmark.operation import operation_cases
from nl_detectron.analysis.benchmark.page import performance_page
from nl_detectron.analysis.benchmark.peak_memory import peak_bytes
from nl_detectron.analysis.benchmark.plot import plot
from nl_detectron.analysis.benchmark.ratio import time_ratio
from nl_detectron.analysis.benchmark.record import Record, load, save
from nl_detectron.analysis.benchmark.rounds import Case, Row, check_agreement, difference, measure
from nl_detectron.analysis.benchmark.sizes import SMALL, Size, parse_size
from nl_detectron.analysis.benchmark.table import markdown_table
from tqdm import tqdm

from nl_detectron import NonLocalBlock, add_nonlocal_config, get_config_file, insert_nonlocal
from nl_detectron.analysis import meta_model

ROOT = Path(__file__).resolve().parent.parent
OUT = "out of memory"
FUNCTIONS = ["gaussian", "embedded_gaussian", "dot_product", "concatenation"]


# What is compared is the same function.


def assert_agreement(cases):
    """Outputs and input gradients of every case that runs, against the first one's."""
    expected = {name: call() for name, call in cases[0].build().items()}
    assert list(expected) == ["forward", "forward+backward"]
    for case in cases[1:]:
        for name, call in case.build().items():
            if case.competitor == "mmcv" and case.facts["function"] == "concatenation":
                if name != "forward":  # it divides the ReLU's output in place
                    with pytest.raises(RuntimeError, match="inplace operation"):
                        call()
                    continue
            for own, other in zip(call(), expected[name], strict=True):
                assert own.dtype == other.dtype == torch.float64 and own.shape == other.shape
                assert (own - other).abs().max() <= 1e-9 * other.abs().max()
    check_agreement(cases)


def test_operations_agree():
    comparisons = operation_cases(SMALL, torch.float64, "cpu")
    assert [cases[0].facts["function"] for cases in comparisons] == FUNCTIONS
    for cases in comparisons:
        assert [case.competitor for case in cases] == ["matrix", "nl_detectron"]
        assert_agreement(cases)


@pytest.mark.parametrize("subsample", ["none", "conv_pool", "pool_conv"])
def test_blocks_agree(subsample):
    comparisons = block_cases(SMALL, torch.float64, "cpu", subsample=subsample)
    functions = [cases[0].facts["function"] for cases in comparisons]
    assert functions == [*FUNCTIONS, "embedded_gaussian, BN"]
    for function, cases in zip(functions, comparisons):
        others = ["mmcv"] if subsample != "pool_conv" else []
        if function.endswith("BN"):
            others = ["timm"] if subsample == "none" else []
        assert [case.competitor for case in cases] == ["matrix", "nl_detectron", *others]
        assert_agreement(cases)


def test_blocks_that_are_another_function_are_refused():
    with pytest.raises(ValueError, match="mmcv"):
        mmcv_block(NonLocalBlock(8))  # pool_conv
    with pytest.raises(ValueError, match="timm"):
        timm_block(NonLocalBlock(8, subsample="none"))  # no BN


def test_disagreement_is_an_error():
    def case(name, factor):
        tensor = factor * torch.ones(3, dtype=torch.float64)
        return Case(name, {}, lambda: {"forward": lambda: [tensor]}, 0)

    check_agreement([case("a", 1), case("b", 1 + 1e-10)])
    with pytest.raises(RuntimeError, match="b is not the function of a: .*differs by 1e-08"):
        check_agreement([case("a", 1), case("b", 1 + 1e-8)])


def test_difference():
    a = torch.tensor([1.0, -4.0])
    assert difference([a], [a]) == 0
    assert difference([a, torch.tensor([1.0, -3.0])], [a, a]) == 0.25
    nan = torch.tensor([1.0, torch.nan])
    for tensors in ([nan, a], [a, nan], [a, a[:1]]):
        assert not difference(tensors, [a, a]) <= 1e9


# Rounds.


def test_what_fails_is_a_row_that_says_so():
    def fail(message):
        raise RuntimeError(message)

    def case(name, call=None, build=None):
        return Case(name, {}, build or (lambda: {"forward": call}), 100)

    rows = (
        case("reference", lambda: [torch.ones(2)]),
        case("same", lambda: [torch.ones(2)]),
        case("other", lambda: [torch.zeros(2)]),
        case("large", partial(fail, "DefaultCPUAllocator: can't allocate memory: you tried")),
        case("large to build", build=partial(fail, "CUDA out of memory. Tried")),
        case("broken", partial(fail, "shapes\nmore")),
    )
    with tqdm(disable=True) as progress:
        ((reference, same, *failed),) = measure(rows, 2, "cpu", progress)
    assert [len(row.seconds) for row in (reference, same)] == [2, 2]
    assert reference.failure == same.failure == ""
    assert reference.difference is None and same.difference == 0
    assert reference.peak_bytes == 100 + 2 * 4
    assert [row.failure for row in failed] == [
        "fails: its output differs by 1",
        OUT,
        OUT,
        "fails: shapes",
    ]
    assert not any(row.seconds for row in failed)


def test_competitors_run_in_turn():
    order = []

    def case(name):
        def call():
            order.append(name)
            return [torch.ones(1)]

        return Case(name, {}, lambda: {"forward": call}, 0)

    with tqdm(disable=True) as progress:
        measure([case("a"), case("b")], 3, "cpu", progress)
    turns = [name for i, name in enumerate(order) if order[i - 1 : i] != [name]]
    assert turns == ["a", "b"] * 4  # the warm-up, and three rounds


# Memory.


def test_peak_is_exact():
    def call():
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        return b, torch.empty(250)

    assert peak_bytes(call, "cpu") == 4 * (1000 + 500)


def test_matrix_is_seen_in_the_peak():
    """N x M floats once in the forward pass of Eq. 4's matrix form, and never in ours."""
    size = Size(1, 8, 16, 32)
    (cases,) = [c for c in operation_cases(size, torch.float32, "cpu") if "dot" in str(c[0].facts)]
    matrix, ours = (peak_bytes(case.build()["forward"], "cpu") for case in cases)
    n_by_m = 4 * size.positions**2
    assert n_by_m < matrix < 1.1 * n_by_m
    assert ours < 0.1 * n_by_m


def test_memory_limit_makes_an_error_of_what_would_be_killed():
    code = """
import re, torch
from nl_detectron.analysis.benchmark.peak_memory import is_out_of_memory, limit_cpu_memory
free = int(re.search(r"MemAvailable: +([0-9]+)", open("/proc/meminfo").read())[1]) * 1024
limit_cpu_memory(share=0.5)
torch.empty(free // 4, dtype=torch.uint8)
try:
    torch.empty(free * 3 // 4, dtype=torch.uint8)
except RuntimeError as error:
    assert is_out_of_memory(error), error
else:
    raise SystemExit("no limit")
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("the limit is set on Linux only")
    subprocess.run([sys.executable, "-c", code], check=True)


# Ratios.


def test_ratio_is_taken_round_by_round():
    reference = [1.0, 2.0, 4.0, 1.0, 2.0]  # the machine was slower in some rounds
    ratio = time_ratio([2 * t for t in reference], reference)
    assert (ratio.value, ratio.low, ratio.high, str(ratio)) == (2, 2, 2, "2")
    ratio = time_ratio([2.25, 4.5, 6.0, 8.5, 10.625], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (ratio.value, ratio.low, ratio.high) == (2.125, 2.125, 2.25)  # of the medians: 2
    ratio = time_ratio([0.5, 0.25, 0.25, 0.25, 0.24], [1.0] * 5)
    assert str(ratio) == "0.25" and (ratio.low, ratio.high) == (0.25, 0.25)


@pytest.mark.parametrize(
    "seconds, text",
    [
        ([2.0] * 4, "refused: 4 rounds, 5 are the least"),
        ([2.0], "refused: 1 round, 5 are the least"),
        ([1.0, 1.75, 2.0, 2.25, 9.0], "refused: spread 25%"),
        ([1.0, 1.75, 2.0, 2.15, 9.0], "2"),  # exactly 20%
        ([0.9, 0.98, 1.01, 1.03, 1.2], "no difference (0.98 to 1.03)"),
        ([0.9, 1.01, 1.02, 1.03, 1.2], "1.02"),
        ([0.9, 0.95, 0.96, 0.97, 1.2], "0.96"),
    ],
)
def test_ratio_says_whether_it_means_anything(seconds, text):
    ratio = time_ratio(seconds, [1.0] * len(seconds))
    assert str(ratio) == text
    assert (ratio.value is None) == text.startswith("refused")


def test_rounds_of_another_number_cannot_be_compared():
    with pytest.raises(ValueError):
        time_ratio([1.0] * 5, [1.0] * 6)


# Records, table, page, plot.


def made_up_record(bench="op", sizes=(100,), device="cpu"):
    def facts(n):
        if bench == "model":
            return {"model": "R_50", "batch": 1, "parameters": 44343216, "GMAC": 263.96}
        return {"function": "dot_product", "B": 1, "C": 8, "N": n}

    def row(n, name, time, **values):
        seconds = [time] * 5
        values = {"seconds": seconds, "peak_bytes": 3 * 2**20, "difference": 0.0, **values}
        return Row(name, "forward+backward", facts(n), 2**20, "", **values)

    comparisons = [
        [
            row(n, "matrix", 0.5, difference=None, peak_bytes=6 * 2**20),
            row(n, "nl_detectron", 0.1),
            row(n, "mmcv", 0, seconds=[], peak_bytes=None, difference=None, failure=OUT),
        ]
        for n in sizes
    ]
    machine, versions = {"processor": "abacus"}, {"torch": "3"}
    command = f"tools/benchmark.py {bench}"
    return Record(bench, command, device, "float32", 5, machine, versions, comparisons)


def test_table():
    lines = markdown_table(made_up_record()).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head = "function B C N competitor pass".split()
    head += ["time, ms", "ratio", "inputs, MiB", "peak, MiB", "peak, ratio", "difference"]
    start = ["dot_product", "1", "8", "100"]
    assert cells[0] == head
    assert cells[2:] == [
        [*start, "matrix", "forward+backward", "500 (500 to 500)", "reference"]
        + ["1.0", "6.0", "-", "-"],
        [*start, "nl_detectron", "forward+backward", "100 (100 to 100)", "0.2"]
        + ["1.0", "3.0", "0.5", "0e+00"],
        [*start, "mmcv", "forward+backward", "-", OUT, "1.0", "-", "-", "-"],
    ]


def test_long_times_are_printed_in_full():
    record = made_up_record()
    record.comparisons[0][0].seconds[:] = [18.662] * record.rounds
    assert "| 18,662 (18,662 to 18,662) |" in markdown_table(record)


def test_page_is_written_from_records(tmp_path):
    folder = tmp_path / "performance"
    folder.mkdir()
    empty = performance_page(folder, "a command")
    assert empty.count("CPU: not run.") == empty.count("GPU: not run.") == 3
    assert "Written by `a command`." in empty
    assert empty.endswith("\nNot run.\n")

    record = made_up_record()
    save(record, folder / "op_cpu")
    assert load(folder / "op_cpu.json") == record
    assert len((folder / "op_cpu.csv").read_text().splitlines()) == 1 + 5 + 5 + 1
    save(made_up_record("model", device="cuda"), folder / "model_gpu")
    page = performance_page(folder, "a command")
    assert page.count("CPU: not run.") == 2 and page.count("GPU: not run.") == 2
    others = [f"{model} +1, +5, +10 NL" for model in list(PLACES)[1:]]
    missing = ["R_50 +1, +5, +10 NL", "R_50 batches above 1", *others]
    assert f"GPU, not run: {'; '.join(missing)}.\n" in page
    measured = made_up_record("model", device="cuda")
    measured.comparisons[0][1].competitor = "+5 NL, pool_conv"
    measured.comparisons[0][1].facts["batch"] = 2
    save(measured, folder / "model_gpu")
    missing = ["R_50 +1, +10 NL", "R_50 batches above 2", *others]
    assert f"GPU, not run: {'; '.join(missing)}.\n" in performance_page(folder, "a command")
    assert "### op cpu\n\nWritten by `tools/benchmark.py op`: float32, 5 rounds." in page
    assert "Machine: processor abacus. Versions: torch 3." in page
    assert markdown_table(record) in page
    assert "![" not in page
    (folder / "op_cpu.png").write_bytes(b"")
    assert "(performance/op_cpu.png)" in performance_page(folder, "a command")

    (folder / "cost").mkdir()
    (folder / "cost" / "cost.md").write_text("two tables\n")
    end = "\n\ntwo tables\n\n![The second table as a chart](performance/cost/cost.png)\n"
    assert performance_page(folder, "a command").endswith(end)

    (folder / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json was not written by"):
        performance_page(folder, "a command")
    with pytest.raises(FileNotFoundError):
        performance_page(tmp_path / "missing", "a command")


def test_plot_needs_three_sizes(tmp_path):
    path = tmp_path / "plot.png"
    assert not plot(made_up_record(sizes=(100, 200)), path)
    assert not plot(made_up_record("model"), path)
    assert not path.exists()
    assert plot(made_up_record(sizes=(100, 200, 400)), path)
    assert path.read_bytes().startswith(b"\x89PNG")


# Models.


@pytest.mark.parametrize("model", PLACES)
def test_numbers_of_blocks(model):
    for count, places in PLACES[model].items():
        with torch.device("meta"):
            names = insert_nonlocal(meta_model(model_config(model, "cpu")), places)
        assert len(names) == count


@pytest.mark.parametrize("count, suffix", [(1, ""), (5, "5_blocks_"), (10, "10_blocks_")])
def test_places_are_those_of_the_shipped_configs(count, suffix):
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    name = f"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_NL_{suffix}1x.yaml"
    cfg.merge_from_file(get_config_file(name))
    assert tuple(cfg.MODEL.NONLOCAL.LOCATION) == PLACES["R_50"][count]


def test_models_share_weights_and_find_the_same():
    cfg = model_config("R_50", "cpu")
    options = {"blocks": [5], "subsamples": ["none"], "height": 64, "width": 96}
    baseline, with_blocks = model_cases("R_50", cfg, torch.float32, **options)
    assert [baseline.competitor, with_blocks.competitor] == ["baseline", "+5 NL, none"]
    blocks = [NonLocalBlock(c, subsample="none") for c in (512, 512, 1024, 1024, 1024)]
    extra = sum(p.numel() for block in blocks for p in block.parameters())
    difference = with_blocks.facts["parameters"] - baseline.facts["parameters"]
    assert difference == extra
    assert with_blocks.standing_bytes - baseline.standing_bytes == 2 * 4 * extra
    sides = [(8, 12)] * 2 + [(4, 6)] * 3
    multiply_adds = sum(block.multiply_adds(*side) for block, side in zip(blocks, sides))
    gmac = with_blocks.facts["GMAC"] - baseline.facts["GMAC"]
    assert gmac == pytest.approx(multiply_adds / 1e9, abs=0.01)

    (a, b) = (case.build() for case in (baseline, with_blocks))
    for _ in range(2):  # a step does not move the weights
        for pass_name in ("training step", "inference"):
            (expected,), (actual,) = a[pass_name](), b[pass_name]()
            assert torch.equal(actual, expected)
            assert torch.isfinite(expected).all() and expected.numel()


# The command line.


def benchmark(*arguments):
    command = [sys.executable, ROOT / "tools" / "benchmark.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_op_and_report(tmp_path):
    stem = tmp_path / "performance" / "op_tiny"
    result = benchmark("op", "--sizes", "4x2x3", "--rounds", "1", "--output", stem)
    assert result.returncode == 0, result.stderr
    assert "round 1 of 1" in result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2 + 4 * 2 * 2
    assert result.stdout == stem.with_suffix(".md").read_text()
    record = json.loads(stem.with_suffix(".json").read_text())
    assert record["command"].startswith("tools/benchmark.py op --sizes 4x2x3")
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__
    rows = [row for rows in record["comparisons"] for row in rows]
    assert all(len(row["seconds"]) == 1 and not row["failure"] for row in rows)
    assert sum("refused: 1 round, 5 are the least" in line for line in lines) == 8

    report = benchmark("report", stem.parent)
    assert result.stdout.strip() in report.stdout
    assert report.stdout.count("GPU: not run.") == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["op", "--sizes", "res9"], "size 'res9' is neither res4 nor res3 nor CxHxW"),
        (["report", "no/such/folder"], "no folder no/such/folder"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = benchmark(*arguments)
    assert result.returncode == 2
    assert f"error: {message}" in result.stderr and "Traceback" not in result.stderr


def test_sizes():
    assert parse_size("res4", 2) == Size(2, 1024, 50, 84)
    assert parse_size("res3", 1).positions == 16800
    for text in ("3x2x2", "4x0x2", "4x2", "x", "-4x2x2"):
        with pytest.raises(ValueError, match="CxHxW"):
            parse_size(text, 1)
