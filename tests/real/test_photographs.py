"""Photographs of COCO with their true annotations, and ImageNet weights of a ResNet-18."""

import json
import logging
import os
from pathlib import Path

import check_dataset
import numpy as np
import pytest
import visualize_attention

from nl_detectron.checkpoint import AuditedCheckpointer, LoadError
from nl_detectron.data.coco import overrides, read_datasets
from nl_detectron.engine import Trainer, argument_parser, load_config, main
from nl_detectron.modeling import build_model

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = Path(os.getenv("NL_SHARED", REPOSITORY.parent / "shared")) / "real"
COCO_FREE, SPLITS = REAL / "coco_free", {"train": "train2017", "test": "val2017"}
CONFIG = str(REPOSITORY / "configs/Synthetic/mask_rcnn_R_18_FPN_NL.yaml")
# The normalisation of the weights, and photographs with a short side of 192 pixels.
OPTIONS = f"""
    MODEL.WEIGHTS {REAL}/weights/r18_stem_to_res4_d2.pth MODEL.RESNETS.NORM FrozenBN
    MODEL.FPN.NORM GN MODEL.BACKBONE.FREEZE_AT 2 INPUT.FORMAT RGB
    MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375]
    MODEL.ANCHOR_GENERATOR.SIZES [[24],[64],[128]]
    INPUT.MIN_SIZE_TRAIN (192,) INPUT.MIN_SIZE_TEST 192 INPUT.MASK_FORMAT bitmask
    SOLVER.IMS_PER_BATCH 2 SOLVER.OPTIMIZER SGD SOLVER.BASE_LR 0.01 SOLVER.WARMUP_ITERS 10
    SOLVER.WEIGHT_DECAY 0.0001 DATALOADER.NUM_WORKERS 0
""".split()
ALL = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]  # AP is nan if there is no detection
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL.is_dir(), reason=f"no folder {REAL}; set NL_SHARED"),
]


def arguments(kind, folder, *options, files=None):
    """Return the arguments of a training on the annotations of a kind, or on these files."""
    flags = ["--config-file", CONFIG]
    for split, name in SPLITS.items():
        path = (files or {}).get(split, COCO_FREE / f"annotations/{kind}_{name}.json")
        images = COCO_FREE / ("train2017" if files else name)
        flags += [f"--{split}-json", str(path), f"--{split}-images", str(images)]
    return argument_parser().parse_args([*flags, *OPTIONS, "OUTPUT_DIR", str(folder), *options])


def train(args):
    """Train; return the loss of each iteration and the metrics."""
    datasets = read_datasets(args)
    cfg = load_config(args.config_file, args.opts, overrides=overrides(datasets))
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    for dataset in datasets.values():
        dataset.register()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    metrics = trainer.train()
    (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(cfg.dump())
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    return np.array(losses), metrics or trainer._last_eval_results


@pytest.mark.parametrize("split", SPLITS.values())
@pytest.mark.parametrize("kind", ["instances", "person_keypoints"])
def test_the_check_finds_no_error(capsys, kind, split):
    file = COCO_FREE / f"annotations/{kind}_{split}.json"
    assert check_dataset.main(["--json", str(file), "--images", str(COCO_FREE / split)]) == 0
    said = capsys.readouterr().out
    crowds = sum(a["iscrowd"] for a in json.loads(file.read_text())["annotations"])
    assert "kinds of errors: 0" in said and (f"note: {crowds} of " in said) == (crowds > 0)


def test_weights(caplog, monkeypatch):
    def load(*options):
        model = build_model(load_config(CONFIG, [*OPTIONS, *options]))
        AuditedCheckpointer(model).load(OPTIONS[1])

    monkeypatch.setattr(logging.getLogger("nl_detectron"), "propagate", True)
    with caplog.at_level(logging.INFO, "nl_detectron"):
        load()
    assert "weights: 75/75 backbone tensors, 9 new in res4.nonlocal0, FPN new" in caplog.text
    with pytest.raises(LoadError, match="res5"):
        load("MODEL.RESNETS.OUT_FEATURES", "['res2','res3','res4','res5']")


def test_mask_rcnn(tmp_path, capsys):
    """The loss falls by a third; evaluation, figure and page work."""
    losses, metrics = train(arguments("instances", tmp_path, "SOLVER.MAX_ITER", "60", *ALL))
    assert len(losses) == 60 and losses[-15:].mean() < 2 / 3 * losses[:5].mean()
    assert 0 <= metrics["bbox"]["AP"] < 100 and 0 <= metrics["segm"]["AP"] < 100

    image = COCO_FREE / "val2017/000000005001.jpg"
    options = ["MODEL.WEIGHTS", f"{tmp_path}/model_final.pth", "DATASETS.TEST", "()"]
    call = ["--config-file", f"{tmp_path}/config.yaml", "--input", str(image)]
    page = tmp_path / "page.html"
    visualize_attention.main([*call, "--query-grid", "1x2", "--output", str(tmp_path), *options])
    assert (tmp_path / f"{image.stem}_res4.0.png").stat().st_size > 10_000
    visualize_attention.main([*call, "--html", str(page), *options])
    assert page.stat().st_size > 10_000


def test_keypoint_rcnn(tmp_path):
    args = arguments(
        *("person_keypoints", tmp_path, "MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "True"),
        *("MODEL.ROI_KEYPOINT_HEAD.NAME", "build_nonlocal_keypoint_head"),
        *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "[32,32,32,32]", "SOLVER.MAX_ITER", "10"),
    )
    main(args)
    metrics = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert metrics["iteration"] == 10 and "keypoints/AP" in metrics and "bbox/AP" in metrics


def test_overfitting_four_images(tmp_path):
    """Mask AP50 is above 50 on the images of the training."""
    data = json.loads((COCO_FREE / "annotations/instances_train2017.json").read_text())
    groups = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        groups[annotation["image_id"]].append(annotation)
    images = [i for i in data["images"] if 0 < len(groups[i["id"]]) <= 3][:4]
    data.update(images=images, annotations=[a for i in images for a in groups[i["id"]]])
    file = tmp_path / "four.json"
    file.write_text(json.dumps(data))
    options = ["SOLVER.MAX_ITER", "500", "SOLVER.STEPS", "(400,)", "SOLVER.BASE_LR", "0.02"]
    options += ["INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MIN_SIZE_TEST", "128"]
    options += ["INPUT.RANDOM_FLIP", "none"]
    args = arguments("instances", tmp_path, *options, files=dict.fromkeys(SPLITS, file))
    _, metrics = train(args)
    assert metrics["segm"]["AP50"] > 50
