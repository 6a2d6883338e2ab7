"""The synthetic task, training, evaluation, prediction, and the study."""

import json
import os
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import synthetic_study as study
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from helpers import WITHOUT_GPUS
from nl_video import add_video_config, data, synthetic
from nl_video.clips import read_frames
from nl_video.trainer import VideoEvaluator, VideoTrainer
from test_video_model import NARROW, PROJECT, config

from nl_detectron.engine import main

TRAIN_NET, RESULTS = str(PROJECT / "train_net.py"), "inference/video_results.json"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets") / "nl_synthetic_video"
    for split in synthetic.SPLITS:
        synthetic.generate(folder, split, 8)
    return folder


def test_files_are_lossless_and_balanced(videos):
    for task, labels in (("xor", [0, 1, 1, 0]), ("both", [0, 1, 2, 3])):
        found = data.read_videos(videos / f"train_{task}.txt")
        assert [video["label"] for video in found] == 2 * labels
    for i, video in enumerate(found):
        drawn, _ = synthetic.draw((0, i), *divmod(i % 4, 2))
        assert np.array_equal(read_frames(video["file_name"], np.arange), drawn)


def test_linear_probe_on_averaged_frame_labels_is_at_chance():
    labels, combinations = np.zeros((64, synthetic.FRAMES, 5)), np.arange(64) % 4
    labels[:, :, 4] = 1  # the constant of the probe
    for i, (cue, event) in enumerate(map(divmod, combinations, [2] * 64)):
        _, places = synthetic.draw((0, i), cue, event)
        for column, (first, _, _) in ((cue, places["cue"]), (2 + event, places["event"])):
            labels[i, first : first + synthetic.DURATION, column] = 1
    averages, exclusive_or = labels.mean(axis=1), np.array([1, -1, -1, 1])[combinations]
    targets = np.column_stack([exclusive_or, np.eye(4)[combinations]])
    fitted = averages @ np.linalg.lstsq(averages, targets, rcond=None)[0]
    assert np.abs(fitted[:, 0]).max() < 1e-12
    assert (fitted[:, 1:].argmax(axis=1) == combinations).all()


@pytest.mark.parametrize("row", list(study.ROWS)[1:])
def test_only_relations_over_time_combine_cue_and_event(row):
    torch.manual_seed(0)
    model = build_model(config(row)).eval().double()
    for name, parameter in model.named_parameters():
        if "nonlocal" in name:
            torch.nn.init.normal_(parameter)
    difference = np.zeros((2, 2))
    for cue, event in np.ndindex(2, 2):
        frames = np.stack(synthetic.draw((0, 1), cue, event)[0])[:32]
        features = model.features(torch.from_numpy(frames).permute(3, 0, 1, 2)[None])
        first, second = model.classifier(features.mean(dim=(2, 3, 4)))[0].tolist()
        difference[cue, event] = first - second
    mixed = abs(np.trace(difference) - np.trace(difference[::-1])) / np.ptp(difference)
    additive = row in ("Synthetic_C2D", "Synthetic_C2D_NL_space")
    assert mixed < 1e-9 if additive else mixed > 1e-4


def test_metrics_of_known_scores(tmp_path):
    MetadataCatalog.get("of/six").set(classes=list("abcdef"))
    options = ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", ("of/six", "of/more")]
    evaluator = VideoEvaluator(config("Synthetic_C2D", *options), "of/six")
    evaluator.reset()
    for label, scores in (
        (0, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]),  # right
        (0, [0.2, 0.3, 0.1, 0.2, 0.1, 0.1]),  # second or third
        (2, [0.2, 0.2, 0.2, 0.2, 0.2, 0.0]),  # equal scores are not right
        (5, [0.2, 0.2, 0.2, 0.2, 0.15, 0.05]),  # the last of six
    ):
        evaluator.process([{"video_id": "v", "label": label}], [{"scores": torch.tensor(scores)}])
    metrics = evaluator.evaluate()["video"]
    assert metrics.pop("cross_entropy") == pytest.approx(-np.log(0.5 * 0.2 * 0.2 * 0.05) / 4)
    assert metrics == {"top1": 25, "top5": 75, "error": 75}
    written = json.loads((tmp_path / "inference/of_six/video_results.json").read_text())
    assert written["per_class"] == {"a": 50, "c": 0, "f": 0}


OPTIONS = """INPUT.CLIP.FRAMES 8 INPUT.CLIP.MIN_SIDE (64,72) DATALOADER.NUM_WORKERS 0 SEED 1
SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 4 TEST.EVAL_PERIOD 2 TEST.PRECISE_BN.NUM_ITER 2""".split()


def arguments(videos, output, *options, flags=()):
    files = {split: (f"{videos}/{split}_both.txt",) for split in synthetic.SPLITS}
    data = ["DATASETS.TRAIN", files["train"], "DATASETS.TEST", files["val"], "OUTPUT_DIR", output]
    opts = [*NARROW, *OPTIONS, *data, "MODEL.VIDEO.NUM_CLASSES", 4, *options]
    file = PROJECT / "configs/I3D_R50_NL_5_blocks.yaml"
    return [str(part) for part in (*flags, "--config-file", file, *opts)]


def train(*options, **flags):
    args = default_argument_parser().parse_args(arguments(*options, **flags))
    return main(args, trainer=VideoTrainer, add_config=add_video_config)


@pytest.mark.slow
def test_resumed_training_and_evaluations(videos, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train(videos, one)
    train(videos, two, "SOLVER.CHECKPOINT_PERIOD", 3)
    (two / "model_final.pth").unlink()
    (two / "last_checkpoint").write_text("model_0000002.pth")
    train(videos, two, flags=["--resume"])
    first, second = (torch.load(folder / "model_final.pth")["model"] for folder in (one, two))
    assert all(torch.equal(first[key], second[key]) for key in {**first, **second})

    # The evaluation at the end of a training is that of its weights.
    weights = ["MODEL.WEIGHTS", str(one / "model_final.pth"), "TEST.CLIP.PROTOCOL"]
    jitter = train(videos, one, *weights, "jitter", flags=["--eval-only"])["video"]
    line = json.loads((one / "metrics.json").read_text().splitlines()[-1])
    assert jitter["cross_entropy"] == pytest.approx(line["video/cross_entropy"])
    # The second of two processes gets fewer of seven videos.
    seven = videos / "seven.txt"
    seven.write_text("".join((videos / "val_both.txt").read_text().splitlines(True)[1:]))
    views = [*weights, "views", "TEST.CLIP.SIDE", 72, "TEST.CLIP.CLIPS", 2]
    views += ["DATASETS.TEST", (str(seven),)]
    train(videos, one, *views, flags=["--eval-only"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", TRAIN_NET]
    subprocess.run([*torchrun, *arguments(videos, two, *views, flags=["--eval-only"])], check=True)
    single, double = (json.loads((run / RESULTS).read_text()) for run in (one, two))
    ids = [video["video_id"] for video in double["videos"]]
    assert single == double and ids == [f"val/{i:04}.mp4" for i in range(1, 8)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit, problem", [((" 1\n", " 4\n"), "has label 4"), (("0005", "gone"), "cannot be decoded")]
)
def test_spawned_processes_report_an_error_in_one_line(edit, problem, videos, tmp_path):
    script, broken = tmp_path / "train.py", videos / "broken.txt"
    script.write_text(WITHOUT_GPUS + open(TRAIN_NET).read())
    broken.write_text((videos / "train_both.txt").read_text().replace(*edit))
    options = ["DATASETS.TRAIN", (str(broken),), "INPUT.CLIP.CHECK", False]
    options += ["DATALOADER.NUM_WORKERS", 1, "TEST.EVAL_PERIOD", 0]
    flags = ["--num-gpus", "2", "--dist-url", "auto"]
    command = [sys.executable, script, *arguments(videos, tmp_path, *options, flags=flags)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1 and problem in done.stderr
    # The other process may log that it has lost the connection.
    assert "Traceback" not in done.stderr and "ImageError" not in done.stdout


def test_predict_prints_classes_and_draws_attention(videos, tmp_path, capsys):
    script = runpy.run_path(str(PROJECT / "predict.py"))  # tools has a predict.py too
    model, weights = build_model(config("Synthetic_C2D_NL")).eval(), tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, weights)
    flags = ["--config-file", str(PROJECT / "configs/Synthetic_C2D_NL.yaml"), "--weights"]
    flags += [str(weights), "--figure", str(tmp_path / "figure.png"), "--query"]
    script["main"]([str(videos / "val/0000.mp4"), *flags, "26", "20", "30"])
    lines = capsys.readouterr().out.splitlines()
    assert {line[8:] for line in lines[-2:]} == set(synthetic.CLASSES["xor"])
    for bad in (["99", "0", "0"], ["0", "0", "0", "--opts", "MODEL.VIDEO.ARCH", "c3d"]):
        with pytest.raises(SystemExit, match="2"):
            script["main"]([str(videos / "val/0000.mp4"), *flags, *bad])
    assert "MODEL.VIDEO.ARCH 'c3d' is unknown; valid: 'c2d', 'i3d'" in capsys.readouterr().err
    clip = torch.randint(0, 256, (1, 3, 32, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        figure = script["draw_attention"](model, clip, "res4.4", None)
    weights = [float(axes.get_title().split()[-1]) for axes in figure.axes]
    assert len(weights) == 4 and sum(weights) == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_study_trains_and_reports(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(videos.parent))
    monkeypatch.setattr(synthetic, "FOLDER", videos)
    shutil.copy(PROJECT / "README.md", tmp_path)
    opts = "SOLVER.MAX_ITER 5 SOLVER.IMS_PER_BATCH 2 TEST.EVAL_PERIOD 3 TEST.PRECISE_BN.NUM_ITER 1"
    study.main(f"--seeds 7 --output {tmp_path} --report {tmp_path} --opts {opts}".split())
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["row"] for result in results] == list(study.ROWS)
    assert "| warm-up: all four combinations |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "attention.png").is_file()
