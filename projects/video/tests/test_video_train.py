"""Training, resuming and evaluation by train_net.py, and the tool that converts weights."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from nl_video.synthetic import generate
from test_video_model import FIVE, NARROW, PROJECT, released_blobs

pytest.importorskip("av")  # writes the videos
run = runpy.run_path(str(PROJECT / "train_net.py"))["run"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    generate(folder, {"train": 8, "val": 5})
    return folder


def train(videos, output, *options, flags=(), config="I3D_R50_NL_5_blocks"):
    file = str(PROJECT / "configs" / f"{config}.yaml")
    small = ["DATASETS.TRAIN", (f"{videos}/train_both.txt",), "MODEL.VIDEO.NUM_CLASSES", 4]
    small += ["DATASETS.TEST", (f"{videos}/val_both.txt",), "INPUT.CLIP.FRAMES", 8, "SEED", 1]
    small += ["INPUT.CLIP.MIN_SIDE", (64, 72), "SOLVER.IMS_PER_BATCH", 2, "OUTPUT_DIR", str(output)]
    small += ["TEST.EVAL_PERIOD", 2, "TEST.PRECISE_BN.NUM_ITER", 2, "DATALOADER.NUM_WORKERS", 0]
    opts = [str(option) for option in (*NARROW, *small, *options)]
    return run(default_argument_parser().parse_args([*flags, "--config-file", file, *opts]))


@pytest.mark.slow
def test_resumed_training_is_the_uninterrupted_one(videos, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train(videos, one, "SOLVER.MAX_ITER", 4)
    train(videos, two, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 2)
    (two / "model_final.pth").unlink()
    (two / "last_checkpoint").write_text("model_0000002.pth")
    train(videos, two, "SOLVER.MAX_ITER", 4, flags=["--resume"])
    first, second = (torch.load(folder / "model_final.pth")["model"] for folder in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)

    # The evaluation at the end of a training is that of its weights.
    weights = ["MODEL.WEIGHTS", str(one / "model_final.pth")]
    jitter = train(videos, tmp_path, *weights, flags=["--eval-only"])
    line = json.loads((one / "metrics.json").read_text().splitlines()[-1])
    assert jitter["video"]["cross_entropy"] == pytest.approx(line["video/cross_entropy"])
    views = ["TEST.CLIP.PROTOCOL", "views", "TEST.CLIP.SIDE", 72, "TEST.CLIP.CLIPS", 2]
    results = train(videos, tmp_path, *weights, *views, flags=["--eval-only"])
    assert results["video"]["top5"] == 100
    output = json.loads((tmp_path / "inference" / "video_results.json").read_text())
    assert len(output["videos"]) == 5


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL.WEIGHTS", "missing.pth"], "there is no file"),
        (["DATASETS.TRAIN", ("missing",)], "missing"),
        (["MODEL.VIDEO.NUM_CLASSES", 3], "has label 3"),
        (["MODEL.NONLOCAL.LOCATION", ("res6.0",)], "must name one of the stages"),
        (["MODEL.BACKBONE.NAME", "build_nl_video_resnet_backbone"], "inserts no block"),
    ],
)
def test_bad_input_ends_in_one_line(videos, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as exit:
        train(videos, tmp_path, *options)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_converted_file_is_evaluated(videos, tmp_path, monkeypatch, capsys):
    source, converted = tmp_path / "released.pkl", tmp_path / "converted.pth"
    torch.save(released_blobs(False, classes=4), source.with_suffix(".pth"))
    convert = runpy.run_path(str(PROJECT / "convert_released.py"))["main"]
    arguments = ["convert_released.py", str(source.with_suffix(".pth")), str(converted)]
    monkeypatch.setattr("sys.argv", arguments)
    convert()
    assert capsys.readouterr().out.endswith("left out: lr, conv1_w_momentum\n")
    options = ["MODEL.WEIGHTS", str(converted), "MODEL.VIDEO.POOLING", "released"]
    results = train(videos, tmp_path, *options, flags=["--eval-only"], config=FIVE)
    assert results["video"]["top5"] == 100

    Path(arguments[1]).write_bytes(b"text")
    with pytest.raises(SystemExit):
        convert()
    assert "cannot be read as a checkpoint" in capsys.readouterr().err
