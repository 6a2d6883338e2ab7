"""Tests of the long-range study: data, controls, receptive field, scores, report and runs."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import key_hits
import numpy as np
import pytest
import study
import torch
from detectron2.modeling import build_backbone
from long_range.backbones import CONTROLS
from long_range.receptive_field import roi_receptive_margin, stage_receptive_field
from long_range.report import difference, read_results, write_tables
from long_range.scores import DISTANCES, guess, images_by_distance, scores
from long_range.synthetic_hard import CATEGORIES, HEIGHT, LOCKS, WIDTH, draw
from PIL import Image
from pycocotools.coco import COCO

from nl_detectron.analysis import meta_model
from nl_detectron.data.synthetic import GAP, generate
from nl_detectron.engine import find_config_file, load_config
from nl_detectron.layers import NonLocalBlock
from nl_detectron.visualization.attention import ImageGeometry


def row_config(row):
    return load_config(str(study.PROJECT / "configs" / f"{row}.yaml"))


def test_images_equal_those_of_the_picture_and_locks_have_their_key():
    picture = np.asarray(Image.open(study.PROJECT / "examples.png"))
    for seed in range(100):
        image, objects = draw(np.random.default_rng(seed))
        if seed < 6:
            y, x = seed // 2 * (HEIGHT + 4), seed % 2 * (WIDTH + 4)
            assert np.array_equal(picture[y : y + HEIGHT, x : x + WIDTH], image)
        xs = {name: [x for x, _ in outline] for name, outline, *_ in objects}
        locks = {name: more for name, _, *more in objects if name in LOCKS}
        assert len(xs) == 4 and len(locks) == 2
        for name, (more,) in locks.items():
            lock, key = xs[name], xs[name.replace("lock", "key")]
            gap = max(min(lock) - max(key), min(key) - max(lock))
            assert 0 < gap < DISTANCES[-1] and more == {"distance": round(gap, 2)}


def test_guesses_and_a_detector_of_near_locks(tmp_path):
    generate(tmp_path / "set", {"val": 60}, draw=draw, categories=CATEGORIES)
    annotations = COCO(tmp_path / "set/val.json")
    chance, colours = (scores(annotations, guess(annotations, k, 0)) for k in ("chance", "colours"))
    assert 28 < chance["locks AP50"] < 60 < colours["locks AP50"] < 99
    assert chance["keys AP50"] == colours["keys AP50"] == pytest.approx(100)
    near = annotations.loadAnns(annotations.getAnnIds(images_by_distance(annotations)[0]))
    found = scores(annotations, [{**annotation, "score": 1.0} for annotation in near])
    assert found["by distance"] == [pytest.approx(100), 0, 0, 0, 0]


@pytest.mark.parametrize("name", CONTROLS)
def test_control_starts_as_identity_and_has_the_form_or_size_of_the_block(name):
    block, x = CONTROLS[name](64).double(), torch.randn(2, 64, 5, 6, dtype=torch.float64)
    assert torch.equal(block(x), x)
    if name.startswith("conv"):
        count, target = (sum(p.numel() for p in m.parameters()) for m in (block, NonLocalBlock(64)))
        per_channel = 2 * block.inner.kernel_size[0] ** 2 * 64 + 1
        assert abs(count - target) <= per_channel / 2
        return
    torch.nn.init.normal_(block.out.weight)
    affinity = torch.eye(30).double() if name == "local" else torch.ones(30, 9).double() / 9
    y = (affinity @ block.values(x)).transpose(1, 2).reshape(2, -1, 5, 6)
    torch.testing.assert_close(block(x), x + block.out(y), rtol=1e-13, atol=1e-13)


def test_receptive_field_is_that_of_the_gradient():
    resnet = build_backbone(row_config("R18")).bottom_up.eval()
    for parameter in resnet.parameters():
        parameter.data.abs_()  # so that nothing cancels, and every ReLU passes its input
    # Many random images, because max pooling passes one of nine pixels in each.
    x = torch.rand(32, 3, 32, 448, requires_grad=True)
    features = resnet(x)["res4"]
    (grad,) = torch.autograd.grad(features[..., features.shape[3] // 2].sum(), x)
    columns = grad.sum((0, 1, 2)).nonzero()
    field = int(columns.max() - columns.min()) + 1
    assert stage_receptive_field(resnet, "res4") == (field, 448 / features.shape[3])


def test_some_locks_are_within_the_receptive_margin_and_some_are_not():
    demo = load_config(find_config_file("Synthetic/mask_rcnn_R_18_FPN.yaml"))
    models = map(meta_model, (row_config("R18"), row_config("R50"), demo))
    r18, r50, of_demo = (roi_receptive_margin(model.backbone) for model in models)
    assert DISTANCES[1] < r18 == 138 < r50 == 166 < DISTANCES[-2] and of_demo < GAP


def test_every_row_has_its_blocks_and_a_config_of_its_own():
    assert len({str(row_config(row)) for row in study.ROWS}) == len(study.ROWS) == 31
    for row, number in {"R50": 0, "NL": 1, "mean": 1, "conv3x3": 1, "NL_4_blocks": 4}.items():
        assert str(meta_model(row_config(row))).count("(nonlocal") == number, row


def test_report_of_the_results_is_the_committed_one(tmp_path):
    for name in ("README.md", "RESULTS.md"):
        copy = shutil.copy(study.PROJECT / name, tmp_path / name)
        write_tables(read_results(study.RESULTS), copy)
        assert copy.read_text() == (study.PROJECT / name).read_text()


def test_difference_is_paired_by_seed_with_a_t_interval():
    # The quantile for two degrees of freedom is 4.303, and the standard error 1 / sqrt(3).
    values = {1: 3.0, 2: 5.0, 3: 7.0, 4: 0.0}
    assert difference(values, {1: 2.0, 2: 3.0, 3: 4.0}) == "+2.0 (-0.5 to +4.5)"
    assert difference(values, {1: 2.0}) == "+1.0" and difference(values, {}) == ""


def test_key_hits():
    geometry = ImageGeometry((48, 64), (96, 128), 16, 32)
    from_centre, from_box = torch.zeros(1, 3, 4), torch.zeros(2, 3, 4)
    from_centre[0, 1, 3], from_box[:, 0, 0] = -2, 1  # the key, by magnitude; elsewhere
    recorder = SimpleNamespace(map_size=lambda _: (6, 8), rows=lambda _, positions: from_box)
    attention = SimpleNamespace(geometry={"res4.0": geometry}, recorder=recorder)
    attention.rows = lambda _, points: from_centre
    lock, key = (1, 1, 7, 15), (50, 20, 60, 33)  # the key covers two of twelve positions
    assert key_hits.hits_key(attention, "res4.0", lock, key) == (True, False, 2 / 12)


@pytest.mark.slow
def test_study_runs_a_row_and_the_row_that_it_starts_from(tmp_path):
    data = tmp_path / "nl_synthetic_hard"
    generate(data, {"train": 16, "val": 60}, draw=draw, categories=CATEGORIES)

    def run(script, *arguments):
        command = [sys.executable, "-W", "ignore", script, *arguments]
        env = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
        return subprocess.run(command, env=env, capture_output=True, text=True)

    def run_study(*opts):
        files = ["--output", tmp_path / "output", "--results", tmp_path / "results.jsonl"]
        return run(study.__file__, "--rows", "NL", "--seeds", "1", *files, "--opts", *opts)

    failed = run_study("DATASETS.TRAIN", "('no_such_data',)")
    assert failed.returncode == 1 and failed.stderr.count("exit status 2; see log.txt") == 2
    finished = run_study("SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "0")
    assert finished.returncode == 0 and "2/2" in finished.stderr, finished.stderr
    line = read_results(tmp_path / "results.jsonl")["NL"][1]
    assert set(line) == set(read_results(study.RESULTS)["NL"][1]) and line["norm"] > 0
    assert "0run" in run_study("SOLVER.MAX_ITER", "4").stderr  # nothing is left to run
    weights = ["MODEL.WEIGHTS", tmp_path / "output/NL/seed1/model_final.pth"]
    hits = run(key_hits.__file__, "--config-file", study.PROJECT / "configs/NL.yaml", *weights)
    assert "nl_synthetic_hard_val, res4.0, 120 locks: from centre " in hits.stdout, hits.stderr
