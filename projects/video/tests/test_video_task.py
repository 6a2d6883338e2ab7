"""The synthetic task, evaluation, prediction, and the study."""

import json
import math
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import synthetic_study as study
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils import comm
from nl_video import data, load_config, synthetic
from nl_video.clips import read_frames
from nl_video.evaluation import VideoEvaluator

pytest.importorskip("av")  # writes the videos
PROJECT = study.PROJECT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "nl_synthetic_video"
    synthetic.generate(folder, {"train": 8, "val": 8})
    return folder


def config(row, *options):
    return load_config(str(PROJECT / f"configs/{row}.yaml"), options)


def test_files_are_lossless_balanced_and_described(folder):
    described = json.loads((folder / "train.json").read_text())
    for task, labels in (("xor", [0, 1, 1, 0]), ("both", [0, 1, 2, 3])):
        videos = data.read_videos(folder / f"train_{task}.txt")
        assert [video["label"] for video in videos] == 2 * labels
    for i, video in enumerate(videos):
        frames = read_frames(video["file_name"], np.arange)
        drawn, places = synthetic.draw((0, i), *divmod(i % 4, 2))
        assert np.array_equal(frames, drawn)
        first, x, y = places["cue"]
        assert described[video["video_id"]]["cue"] == [first, x, y]
        colour = synthetic.COLOURS[described[video["video_id"]]["cue is"]]
        shown = [n for n, frame in enumerate(frames) if tuple(frame[y, x]) == colour]
        assert shown == list(range(first, first + synthetic.DURATION))
    modified = (folder / "train.json").stat().st_mtime_ns
    synthetic.generate(folder, {"train": 8})
    assert (folder / "train.json").stat().st_mtime_ns == modified


def test_linear_probe_on_averaged_frame_labels_is_at_chance():
    """It tells which cue and which event there are, and nothing about their exclusive or."""
    averages, classes, combinations = [], [], []
    for i in range(64):
        cue, event = divmod(i % 4, 2)
        _, places = synthetic.draw((0, i), cue, event)
        labels = np.zeros((synthetic.FRAMES, 4))
        for column, (first, _, _) in ((cue, places["cue"]), (2 + event, places["event"])):
            labels[first : first + synthetic.DURATION, column] = 1
        averages.append(labels.mean(axis=0))
        classes.append([1.0, -1.0][cue ^ event])
        combinations.append(np.eye(4)[2 * cue + event])

    def fit(targets):
        inputs = np.column_stack([averages, np.ones(64)])
        return inputs @ np.linalg.lstsq(inputs, np.array(targets), rcond=None)[0]

    assert np.abs(fit(classes)).max() < 1e-12
    assert (fit(combinations).argmax(1) == np.argmax(combinations, 1)).all()


def test_no_feature_of_c2d_depends_on_cue_and_event():
    (_, last_cue), (first_event, _) = synthetic.FIRST_CUE, synthetic.FIRST_EVENT
    gap = first_event - (last_cue + synthetic.DURATION - 1)
    model = build_model(config("Synthetic_C2D")).eval()
    clips = torch.rand(1, 3, 32, 48, 48, requires_grad=True)
    for t in range(4):
        (gradient,) = torch.autograd.grad(model.features(255 * clips)[:, :, t].sum(), clips)
        frames = gradient.abs().amax((0, 1, 3, 4)).nonzero()
        assert frames.max() - frames.min() < gap


@pytest.mark.parametrize("row", study.ROWS)
def test_only_relations_over_time_combine_cue_and_event(row):
    """Without them, d(A, B) = a(A) + b(B) for the difference d of the logits."""
    torch.manual_seed(0)
    model = build_model(config(row)).eval().double()
    for name, parameter in model.named_parameters():
        if "nonlocal" in name:
            torch.nn.init.normal_(parameter)
    difference = {}
    for cue in range(2):
        for event in range(2):
            frames = np.stack(synthetic.draw((0, 1), cue, event)[0])[:32]
            features = model.features(torch.from_numpy(frames).permute(3, 0, 1, 2)[None])
            first, second = model.classifier(features.mean(dim=(2, 3, 4)))[0].tolist()
            difference[cue, event] = first - second
    scale = max(abs(d - difference[0, 0]) for d in difference.values())
    mixed = difference[0, 0] + difference[1, 1] - difference[0, 1] - difference[1, 0]
    if row in ("Synthetic_C2D", "Synthetic_C2D_NL_space"):
        assert abs(mixed) < 1e-9 * scale
    else:
        assert abs(mixed) > 1e-4 * scale


def test_metrics_of_known_scores(tmp_path):
    MetadataCatalog.get("six").set(classes=list("abcdef"))
    evaluator = VideoEvaluator("six", str(tmp_path))
    scores = torch.tensor([
        [0.5, 0.1, 0.1, 0.1, 0.1, 0.1],  # right
        [0.2, 0.3, 0.1, 0.2, 0.1, 0.1],  # second or third
        [0.2, 0.2, 0.2, 0.2, 0.2, 0.0],  # equal scores are not right
        [0.2, 0.2, 0.2, 0.2, 0.15, 0.05],  # the last of six
    ])  # fmt: skip
    labels = [0, 0, 2, 5]
    for number, (label, row) in enumerate(zip(labels, scores)):
        evaluator.process([{"video_id": f"{number}", "label": label}], [{"scores": row}])
    metrics = evaluator.evaluate()["video"]
    assert metrics["top1"] == 25 and metrics["top5"] == 75
    assert metrics["mean_class"] == pytest.approx(50 / 3)
    expected = -sum(math.log(p) for p in (0.5, 0.2, 0.2, 0.05)) / 4
    assert metrics["cross_entropy"] == pytest.approx(expected)
    written = json.loads((tmp_path / "video_results.json").read_text())
    assert written["per_class"] == {"a": 50, "c": 0, "f": 0}
    assert [video["video_id"] for video in written["videos"]] == list("0123")


def test_processes_share_the_videos(folder, monkeypatch):
    name = str(folder / "val_xor.txt")
    cfg = config("Synthetic_C2D", "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0)
    data.register_paths(cfg)
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    found = []
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        found += [v["video_id"] for batch in data.build_test_loader(cfg, name) for v in batch]
    assert found == [f"val/{i}.mp4" for i in range(8)]


def test_predict_prints_classes_and_draws_a_figure(folder, tmp_path, capsys):
    main = runpy.run_path(str(PROJECT / "predict.py"))["main"]  # tools has a predict.py too
    weights, figure = tmp_path / "weights.pth", tmp_path / "figure.png"
    torch.save({"model": build_model(config("Synthetic_C2D_NL")).state_dict()}, weights)

    def predict(file, *flags):
        config_file = str(PROJECT / "configs/Synthetic_C2D_NL.yaml")
        arguments = [str(file), "--config-file", config_file, "--weights", str(weights)]
        main([*arguments, "--figure", str(figure), *flags])

    predict(folder / "val/0.mp4", "--query", "26", "20", "30")
    lines = capsys.readouterr().out.splitlines()
    assert {line[8:] for line in lines[-2:]} == set(synthetic.CLASSES["xor"])
    assert figure.stat().st_size > 10_000
    for flags in (("--query", "99", "0", "0"), ("--block", "x")):
        with pytest.raises(SystemExit, match="2"):
            predict(folder / "val/0.mp4", *flags)
    with pytest.raises(SystemExit, match="2"):
        predict("gone.mp4")
    assert "gone.mp4" in capsys.readouterr().err


@pytest.mark.slow
def test_study_trains_and_reports(folder, tmp_path):
    environment = {**os.environ, "DETECTRON2_DATASETS": str(folder.parent)}
    results, output = tmp_path / "results.jsonl", str(tmp_path / "output")
    script = str(PROJECT / "synthetic_study.py")
    command = [sys.executable, script, "--seeds", "7", "--output", output]
    options = ("SOLVER.MAX_ITER", "5", "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "3")
    command += ["--results", str(results), "--opts", *options, "TEST.PRECISE_BN.NUM_ITER", "1"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert set(study.read_results(results)) == {(r, 7) for r in (study.WARM_UP, *study.ROWS)}
    assert process.stdout.count("| +1 block") == 3
    study.plot(study.read_results(results), tmp_path / "curves.png")
