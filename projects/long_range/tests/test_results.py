"""The study on the harder synthetic data: its data, controls, numbers, and page."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nl_detectron.data.synthetic_hard import (
    CATEGORIES,
    COLOURS,
    HEIGHT,
    KEYS,
    KINDS,
    LOCKS,
    WIDTH,
    draw,
)
from nl_detectron.modeling.controls import CONTROLS, LocalBlock, MeanBlock, ResidualConvs
from nl_detectron.study.findings import findings
from nl_detectron.study.intervals import interval, paired, t_quantile
from nl_detectron.study.page import SECTIONS, markdown
from nl_detectron.study.record import hash_without_start, record_path, write_json
from nl_detectron.study.results import Study, is_warm_up
from nl_detectron.study.run import run_study
from nl_detectron.study.scores import BINS, images_by_distance, levels, scores
from pycocotools.coco import COCO

from nl_detectron import NonLocalBlock, study
from nl_detectron.analysis import count_multiply_adds, meta_model, roi_reach
from nl_detectron.data import generate
from nl_detectron.evaluation.runner import Job, Settings, jobs

ROOT = Path(__file__).resolve().parents[1]
C = 64  # channels of res4 in the study


def box(outline):
    xs, ys = zip(*outline)
    return min(xs), min(ys), max(xs), max(ys)


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hard") / "set"
    generate(folder, {"val": 60}, draw=draw, categories=CATEGORIES)
    return COCO(folder / "val.json")


def test_a_lock_has_the_shape_and_colour_of_the_key_at_its_distance():
    nearest, farthest, one_colour = WIDTH, 0, 0
    for seed in range(300):
        image, objects = draw(np.random.default_rng(seed))
        assert image.size == (WIDTH, HEIGHT)
        keys = {name.split()[0]: (name, box(o)) for name, o in objects[:2]}
        locks = {name.split()[0]: (name, box(o), more) for name, o, more in objects[2:]}
        assert set(keys) == set(locks) == set(KINDS)
        for kind, (name, lock, more) in locks.items():
            key_name, key = keys[kind]
            assert name in LOCKS and key_name in KEYS
            assert name.split()[:2] == key_name.split()[:2]
            assert more == {"distance": round(max(lock[0] - key[2], key[0] - lock[2]), 2)}
            assert more["distance"] > 0
            nearest, farthest = min(nearest, more["distance"]), max(farthest, more["distance"])
        boxes = [box(o) for _, o, *_ in objects]
        for i, a in enumerate(boxes):
            assert 0 < a[0] < a[2] < WIDTH and 0 < a[1] < a[3] < HEIGHT
            for b in boxes[:i]:
                assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
        one_colour += len({name.split()[1] for name, _ in keys.values()}) == 1
    assert nearest < BINS[1] and BINS[-2] < farthest < BINS[-1]
    assert 225 < one_colour < 275  # three of four on purpose, and a third of the others


def test_the_distance_is_in_the_annotations(annotations):
    for annotation in annotations.dataset["annotations"]:
        assert ("distance" in annotation) == (annotation["category_id"] > len(KEYS))
    images = [image for _, _, of in images_by_distance(annotations) for image in of]
    assert sorted(images) == sorted(annotations.imgs)


def test_some_locks_are_farther_than_either_backbone_sees():
    settings = Settings(Path("runs"), seeds=1)
    todo = {job.row.name: job for job in jobs(study.TABLE, ["R18", "R50"], settings)}
    reach = {n: roi_reach(meta_model(j.config(settings)).backbone) for n, j in todo.items()}
    assert BINS[1] < reach["R18"] < reach["R50"] < BINS[-2]


def test_levels_are_what_the_evaluator_gives(annotations):
    found = levels(annotations)
    for group in ("keys", "locks"):
        assert found["all"][group] == {"AP": pytest.approx(100), "AP50": pytest.approx(100)}
    assert found["chance"]["keys"] == found["all"]["keys"]
    chance, colours = (found[name]["locks"]["AP50"] for name in ("chance", "colours"))
    assert 100 / len(COLOURS) - 5 < chance < 60 < colours < 99
    assert len(found["chance"]["by_distance"]) == len(BINS) - 1


def test_locks_are_scored_by_their_distance(annotations):
    """A detector that knows the near locks only, and reports no other."""
    near = set(images_by_distance(annotations)[0][2])
    detections = [
        {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": 1.0}
        for a in annotations.dataset["annotations"]
        if a["image_id"] in near
    ]
    found = scores(annotations, detections)["by_distance"]
    assert [of["AP50"] for of in found] == [pytest.approx(100), *[0.0] * (len(BINS) - 2)]


@pytest.mark.parametrize("control", [LocalBlock, MeanBlock])
def test_fixed_affinity_is_the_matrix_form_with_it(control):
    torch.manual_seed(0)
    block = control(8).double()
    torch.nn.init.normal_(block.out.weight)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    g = block.values(x)
    n, m = 30, g.shape[1]
    if control is LocalBlock:
        affinity = torch.eye(n, m, dtype=torch.float64)
    else:
        affinity = torch.full((n, m), 1 / m, dtype=torch.float64)
    y = (affinity @ g).transpose(1, 2).reshape(2, -1, 5, 6)
    torch.testing.assert_close(block(x), x + block.out(y), rtol=1e-13, atol=1e-13)
    assert m == (n if control is LocalBlock else 9)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_convolutions_have_the_parameters_of_the_block(kernel_size):
    control, block = ResidualConvs(C, kernel_size), NonLocalBlock(C)
    count, wanted = (sum(p.numel() for p in m.parameters()) for m in (control, block))
    width = control.inner.out_channels
    one = 2 * kernel_size**2 * C + 1  # parameters of one more channel
    assert count == one * width + C
    assert wanted == 4 * C * (C // 2) + 3 * (C // 2) + C
    assert abs(count - wanted) <= one / 2
    x = torch.zeros(1, C, HEIGHT // 16, WIDTH // 16)
    of_control, of_block = count_multiply_adds(control, x), block.multiply_adds(*x.shape[2:])
    assert of_control == x[0, 0].numel() * 2 * kernel_size**2 * C * width
    assert of_control > of_block  # the block pools first


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_start_as_the_identity(name):
    block = CONTROLS[name](8)
    x = torch.randn(2, 8, 5, 6)
    assert torch.equal(block(x), x)


def test_rows_change_what_their_names_say(tmp_path):
    """Every row stands in a table of the page, builds, and differs from all others."""
    settings = Settings(tmp_path, seeds=1)
    on_page = {name for _, _, names, _ in SECTIONS for name in names}
    rows = [row.name for row in study.TABLE.rows]
    assert on_page == {name for name in rows if not is_warm_up(name)}
    configs = [job.config(settings) for job in jobs(study.TABLE, [], settings)]
    assert len({json.dumps(cfg, sort_keys=True) for cfg in configs}) == len(rows)
    blocks = {}
    for name, cfg in zip(rows, configs):
        model = meta_model(cfg)
        names = [n for n, _ in model.named_modules() if n.split(".")[-1].startswith("nonlocal")]
        blocks[name] = [n.removeprefix("backbone.bottom_up.") for n in names]
    assert blocks["R18"] == blocks["R50"] == []
    assert blocks["NL"] == blocks["mean"] == blocks["conv3x3"] == ["res4.nonlocal0"]
    assert blocks["NL_res2"] == ["res2.nonlocal0"]
    assert blocks["NL_2_blocks"] == ["res4.nonlocal0", "res4.nonlocal1"]


def test_t_intervals():
    """Against the printed tables of the t distribution, and a worked example."""
    for freedom, printed in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert round(t_quantile(freedom), 3) == printed
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation, found.count) == (2.0, 1.0, 3)
    assert round(found.high - 2, 4) == round(2 - found.low, 4) == round(4.302653 / math.sqrt(3), 4)
    assert not found.excludes_zero and interval([9.0, 9.1, 9.2]).excludes_zero
    assert interval([]) is None and interval([1.0]).low is None


def test_differences_are_paired_by_seed():
    found = paired({1: 5.0, 2: 9.0, 3: 1.0}, {2: 4.0, 3: 1.0, 4: 50.0})
    assert (found.mean, found.count) == (2.5, 2)
    assert paired({1: 5.0}, {2: 4.0}) is None


def fake_record(row, seed, value):
    at = [
        {"low": a, "high": b, "images": 1, "AP": value, "AP50": value}
        for a, b in zip(BINS, BINS[1:])
    ]
    return {
        "row": row,
        "seed": seed,
        "state": "finished",
        "core_seconds": 10.0,
        "start": "R18_warm_up",
        "config_hash": "0" * 12,
        "iterations": 300,
        "seconds_per_iteration": 0.1,
        "max_memory_mib": 100.0,
        "parameters": 1000,
        "multiply_adds": 10**7,
        "reach": 138,
        "metrics": {"bbox/AP": value, "bbox/AP50": value, "bbox/AP75": value},
        "keys": {"AP": 90.0, "AP50": 95.0},
        "locks": {"AP": value, "AP50": value},
        "by_distance": at,
        "curves": {"total_loss": [[19, 1.0], [39, 0.5]], "bbox/AP": [[39, value]]},
        "out_norms": {"res4.nonlocal0": 1.5} if row.startswith("NL") else {},
        "environment": {"device": "CPU", "torch": "2", "detectron2": "0.5", "commit": "abc"},
    }


@pytest.fixture
def records(tmp_path, annotations):
    folder = tmp_path / "records"
    write_json(folder / "levels.json", levels(annotations))
    for seed in (1, 2, 3):
        for row, value in (("R18", 40.0), ("NL", 60.0), ("mean", 59.0 + seed)):
            record = fake_record(row, seed, value + seed / 10)
            write_json(folder / f"{row}_seed{seed}.json", record)
    started = {key: fake_record("R50", 1, 0)[key] for key in ("row", "seed", "core_seconds")}
    started.update(state="started", start="R50_warm_up", config_hash="1" * 12)
    write_json(folder / "R50_seed1.json", started)
    return folder


def test_the_page_says_what_the_records_say(records, tmp_path):
    study.write_page(records, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    assert text == markdown(Study.read(records))
    assert "One block takes the locks AP50 from 40.2 to 60.2, +20.0 (+20.0 to +20.0)" in text
    assert re.search(r"\| NL +\| 3 +\| 60.2 ± 0.1", text)
    assert re.search(r"\| R50 +\| not run \| not run", text)
    assert re.search(rf"\| R50 +\| 1 +\| started +\| {'1' * 12}", text)
    assert "Not run, or not all of it: conv1x1, conv3x3, R50." in text
    for figure in ("results_distance.png", "results_curves.png"):
        assert (tmp_path / figure).stat().st_size > 10_000


@pytest.mark.parametrize(
    "gain, verdict",
    [((2, 2, 2), "holds here"), ((9, 9, 9), "does not hold here"), ((-9, 0, 9), "is not settled")],
)
def test_findings_of_the_longer_rows(annotations, gain, verdict):
    """All rows alike, but for those that sleep, the longer blocks, and the Gaussian among these."""
    chance = levels(annotations)["chance"]["locks"]["AP50"]
    records = []
    for name in (row.name for row in study.TABLE.rows if not is_warm_up(row.name)):
        for seed in (1, 2, 3):
            value = 70.0 + seed
            if name == "NL_BN" and seed > 1:
                value = chance + 1
            if name.endswith("_long") and name.startswith(("NL", "mean")):
                value += 10
            if name == "NL_gaussian_long":
                value += gain[seed - 1]
            records.append(fake_record(name, seed, value))
    first, second, third, fourth, fifth = findings(
        Study(records, levels(annotations))
    ).splitlines()[:5]
    assert "from 72.0 to 72.0, +0.0 (+0.0 to +0.0), where" in first
    assert "above none of them, by the interval; trained three times" in second
    assert second.endswith("NL +10.0 (+10.0 to +10.0).")
    more = sum(gain) / 3
    assert "long, the average gives +10.0 (+10.0 to +10.0), and attention adds:" in third
    assert f"attention adds: Gaussian {more:+.1f} (" in third
    short, longer = fourth.split("; trained three times as long, ")
    assert short.endswith('"hardly differ" holds here')
    assert f'"hardly differ" {verdict}' in longer and f"Gaussian {more:+.1f} (" in longer
    blocks = sum(row.name.startswith(("NL", "mean")) for row in study.TABLE.rows)
    assert f"of all {3 * blocks} runs" in fifth and "above chance: NL_BN (2, 3); that is" in fifth


def test_the_page_in_the_repository_is_that_of_its_records(tmp_path):
    """Byte for byte, without training."""
    tool(tmp_path, "--no-training")
    assert (tmp_path / "RESULTS.md").read_bytes() == (ROOT / "docs/RESULTS.md").read_bytes()


def test_records_that_cannot_be_read(tmp_path):
    process = tool(tmp_path, "--no-training", "--records", str(tmp_path), status=2)
    assert re.fullmatch(r"error: .*levels.json.*\n", process.stderr)


def tool(folder, *arguments, status=0):
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/reproduce.py"), "synthetic"]
    process = subprocess.run(
        [*command, "--page", str(folder / "RESULTS.md"), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == status, process.stderr
    return process


def test_runs_are_recorded_whatever_becomes_of_them(tmp_path, monkeypatch):
    """The warm-up fails, so what begins with it cannot run; another row runs; then all is well."""
    from nl_detectron.study import run

    settings = Settings(tmp_path / "runs", seeds=1)
    todo = list(jobs(study.TABLE, ["R18_warm_up", "R50_warm_up", "R18"], settings))
    states, fail = {}, {"R18_warm_up"}

    def run_job(job, settings):
        if job.row.name in fail:
            return "exit status 3"
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "model_final.pth").touch()
        return ""

    def write(folder, job, settings, state, seconds):
        states.setdefault(job.row.name, []).append(state)
        record = {"state": state, "core_seconds": seconds}
        record["config_hash"] = hash_without_start(job, settings)
        write_json(record_path(folder, job), record)

    monkeypatch.setattr(run, "run_job", run_job)
    monkeypatch.setattr(run, "write_record", write)
    monkeypatch.setattr(run, "write_levels", lambda folder, cfg: None)
    failures = run_study(todo, settings, tmp_path / "records")
    assert states == {
        "R18_warm_up": ["started", "failed"],
        "R50_warm_up": ["started", "failed", "finished"],
    }
    assert len(failures) == 2 and "is not there" in failures[1]
    fail.clear()
    assert run_study(todo, settings, tmp_path / "records") == []
    assert states["R18_warm_up"] == ["started", "failed", "started", "failed", "finished"]
    assert states["R18"] == ["started", "failed", "finished"] and len(states["R50_warm_up"]) == 3

    # The records are kept and the weights are not: who needs them gets them made again.
    todo[0].folder.joinpath("model_final.pth").unlink()
    assert run_study(todo, settings, tmp_path / "records") == []
    assert len(states["R18_warm_up"]) == 5
    record_path(tmp_path / "records", todo[2]).unlink()
    assert run_study(todo, settings, tmp_path / "records") == []
    assert len(states["R18_warm_up"]) == 8 and len(states["R18"]) == 6

    other = Settings(tmp_path / "runs", seeds=1, opts=["SOLVER.BASE_LR", "0.5"])
    failures = run_study(todo, other, tmp_path / "records")
    assert len(failures) == 3 and "R18_seed1.json: was made with another config" in failures[2]


def test_a_seed_is_whole_before_the_next_begins(tmp_path):
    todo = list(jobs(study.TABLE, [], Settings(tmp_path, seeds=2)))
    rows = len(study.TABLE.rows)
    assert [job.seed for job in todo] == [1] * rows + [2] * rows
    by_row = {job.row.name: job for job in todo[:rows]}
    start = by_row["R18_warm_up"].folder / "model_final.pth"
    assert by_row["NL"].start == by_row["R18"].start == start
    assert isinstance(todo[0], Job) and len({job.folder for job in todo}) == 2 * rows
