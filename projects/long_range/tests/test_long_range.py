"""Tests of the long-range study: data, controls, receptive field, measures, runs and report."""

from dataclasses import replace

import detector
import figure
import numpy as np
import pytest
import study
import torch
from detectron2.data import DatasetCatalog
from long_range import measures, recall, report, rows, training
from long_range.model import MeanBlock, pool
from long_range.rows import ROWS, TABLES
from torch import nn
from torch.nn import functional as F

from nl_detectron.data import generate
from nl_detectron.evaluation.runs import load_run_config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path_factory.mktemp("datasets")))
        patch.setattr(recall, "SPLITS", {"train": 20, "val": 8})
        yield


def decode(image, box):
    x0, y0, x1, _ = box
    centres = (np.array([2, 4, 6]) * (x1 - x0) / 8).astype(int)
    cells = np.asarray(image.convert("L"))[np.ix_(y0 + centres, x0 + centres)] > 40
    return "".join(str(int(cell)) for cell in np.delete(cells.flatten(), 4))


@pytest.mark.parametrize("keys", [2, 4, 8])
def test_a_lock_has_the_glyph_of_its_key_and_the_class_of_its_colour(keys):
    sides = set()
    for seed in range(40):
        image, objects = recall.draw(np.random.default_rng(seed), keys)
        boxes = np.array([(*outline[0], *outline[2]) for _, outline, _ in objects])
        words = [decode(image, box) for box in boxes]
        assert len(set(words[:keys])) == keys and words[:keys] == words[keys:]
        for name, _, fields in objects[keys:]:
            key = fields["key"]
            colour = list(recall.COLOURS)[fields["colour"]]
            assert image.getpixel(tuple(boxes[key, :2])) == recall.COLOURS[colour]
            assert name == f"{colour} lock" and objects[key][0] == f"{words[key]} key"
        gaps = boxes[keys:, 0].min() - boxes[:keys, 2].max(), boxes[:keys, 0].min()
        gaps = gaps[0], gaps[1] - boxes[keys:, 2].max()  # if the keys are on the left, or right
        assert max(gaps) >= recall.GAP
        sides.add(gaps[0] > 0)
    assert sides == {True, False}


def test_the_registered_dataset_and_the_images_of_the_training_agree(dataset):
    images = training.load_images(4, "val")
    for i, image in enumerate(DatasetCatalog.get("nl_recall_4_val")):
        classes = [annotation["category_id"] for annotation in image["annotations"]]
        assert classes == [*images.glyphs[i, :4].tolist(), *(16 + images.colours[i, 4:]).tolist()]
        assert torch.equal(images.colours[i, :4], images.colours[i, 4:])
        x, y, width, height = image["annotations"][5]["bbox"]
        assert images.boxes[i, 5].tolist() == [x, y, x + width, y + height]


@pytest.mark.parametrize("name", ["R18", "conv1x1", "conv3x3", "R50", "mean"])
def test_a_lock_sees_its_key_only_through_a_global_block(name, monkeypatch):
    backbone = training.build_net(ROWS[name], 1)[0].backbone.eval().double()
    for parameter in backbone.parameters():
        parameter.data.abs_().add_(1e-3)  # so that nothing cancels, and every ReLU is active
    monkeypatch.setattr(F, "max_pool2d", F.avg_pool2d)  # which has a gradient for every pixel
    nearest = (recall.WIDTH + recall.GAP) // 2
    box = torch.tensor([[[nearest, 40, nearest + 30, 70]]]).double()
    pixels = torch.rand(1, 3, recall.HEIGHT, recall.WIDTH).double().requires_grad_()
    pool(backbone(pixels)["res4"], box).sum().backward()
    assert pixels.grad[..., : nearest - recall.GAP].any() == (name == "mean")
    assert pixels.grad.isfinite().all() and pixels.grad[..., nearest:].all()


def test_the_mean_is_its_matrix_form():
    mean, x = MeanBlock(64, bottleneck_channels=8).double(), torch.randn(2, 64, 5, 6).double()
    nn.init.normal_(mean.out.weight)
    y = mean.g(x).flatten(2) @ torch.full((30, 30), 1 / 30, dtype=torch.float64)
    expected = x + mean.out(y.reshape(2, 8, 5, 6))
    torch.testing.assert_close(mean(x), expected, rtol=1e-12, atol=1e-12)


def test_every_row_starts_as_its_network_without_a_block():
    pixels = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8)
    boxes = torch.tensor([[[5.0, 5, 40, 40], [50, 20, 80, 50]]])
    plain = {ROWS[name].depth: training.build_net(ROWS[name], 1)[0] for name in ("R18", "R50")}
    for row in ROWS.values():
        net, blocks = training.build_net(row, 1)
        assert len(blocks) == (0 if row.block is None else len(row.location))
        expected = plain[row.depth].eval()(pixels, boxes)
        assert all(map(torch.equal, net.eval()(pixels, boxes), expected)), row.name


def test_ap50_of_the_truth_and_of_guesses(dataset):
    images = training.load_images(4, "val")
    truth = F.one_hot(images.colours[:, 4:], 4).float()
    assert measures.locks_ap50(truth, 4) == pytest.approx(100)
    assert measures.locks_ap50(1 - truth, 4) < 30
    colours = measures.guess(images, True, 0)
    assert torch.equal(colours.int(), truth.sum(1, keepdim=True).expand(-1, 4, -1).int())


def test_hits_of_a_block_that_attends_to_a_known_object(dataset):
    images = training.load_images(4, "val")
    net, (block,) = training.build_net(ROWS["no sub-sampling"], 1)
    x, y = (images.centres() // 16).long().unbind(dim=2)
    of_keys, of_locks = (y * (recall.WIDTH // 16) + x).chunk(2, dim=1)
    for targets, expected in ((of_keys, 100), (of_locks, 0)):
        affinity = torch.zeros(8, 192, 192)
        for image, queries, columns in zip(affinity, of_locks, targets):
            image[queries, columns] = 1
        block.affinity_matrix = lambda _, affinity=affinity: affinity
        attention, positions = measures.lock_attention(net, block, images)
        assert measures.hits(positions, images) == expected
        assert attention.sum() == 8 * 4


@pytest.mark.slow
def test_study_runs_what_is_missing_and_the_report_has_it(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "WARM_UP", 2)
    for module in (training, report):
        monkeypatch.setattr(module, "EVALUATE_EVERY", 2)
    names, results = ["embedded Gaussian", "mean"], tmp_path / "results.jsonl"
    short = [replace(ROWS[name], iterations=4) for name in names]
    monkeypatch.setitem(TABLES, "main", short)
    for row in short:
        monkeypatch.setitem(ROWS, row.name, row)
    argv = ["--rows", *names, "--seeds", "1", "2", "--output", str(tmp_path)]
    argv += ["--results", str(results)]
    study.main([*argv, "--workers", "2"])
    lines = report.read_results(results)
    study.main(argv)
    assert report.read_results(results) == lines
    trained = {(line["row"], line["seed"]): line for line in lines if "accuracy" in line}
    assert set(trained) == {(name, seed) for name in names for seed in (1, 2)}
    for line in trained.values():
        assert len(line["accuracy"]) == 2 and 0 <= line["locks AP50"] <= 100
        assert ("on key" in line) == (line["row"] == "embedded Gaussian")

    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table main -->\nold\n<!-- end -->\nb")
    report.write_tables(lines, [page])
    text = page.read_text()
    assert text.startswith("a\n") and text.endswith("b") and "old" not in text
    assert "| embedded Gaussian" in text and "| -, -" in text
    lines = [{"accuracy": curve} for curve in ([0.2, 0.3], [0.2, 0.95, 0.4], [0.9, 0.9])]
    assert report.iterations_until_90(lines) == ["2", "4", "-"]

    image = training.load_images(8, "val").select(slice(1))
    white = [(figure.draw(image, row, tmp_path) == 255).all(axis=2).sum() for row in short]
    assert white[0] > white[1] == 0  # arrows


@pytest.mark.slow
def test_detectors_start_from_the_baseline_of_their_seed(tmp_path, monkeypatch):
    generate(tmp_path / "nl_synthetic", {"train": 8, "val": 4})
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    results = tmp_path / "detectors.jsonl"
    argv = ["--rows", "baseline", "inserted", "--seeds", "1", "--output", str(tmp_path)]
    argv += ["--results", str(results), *"SOLVER.MAX_ITER 5 SOLVER.STEPS (4,)".split()]
    detector.main(argv)
    lines = report.read_results(results)
    assert [(line["row"], line["seed"]) for line in lines] == [("baseline", 1), ("inserted", 1)]
    assert all(0 <= line["locks AP"] <= 100 for line in lines)
    weights = load_run_config(tmp_path / "inserted" / "seed1").MODEL.WEIGHTS
    assert weights == str(tmp_path / "baseline" / "seed1" / "model_final.pth")
