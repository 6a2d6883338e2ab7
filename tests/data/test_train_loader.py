"""Batches that depend on seed and iteration only, and errors that name the image."""

import re
from itertools import islice

import detectron2.data.build
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_train_loader
from detectron2.utils import comm
from PIL import Image
from torch.utils._pytree import tree_leaves

from nl_detectron.data.train_loader import ImageError, ImageLoader, TrainLoader

SIZES = [(40, 30), (30, 40), (50, 30), (30, 50), (44, 30), (60, 30), (30, 36)]  # width, height


def picture(width, height):
    return Image.effect_noise((width, height), 50).convert("RGB")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Register 7 images of noise, each with a different box."""
    dicts = []
    for i, (width, height) in enumerate(SIZES):
        file = str(tmp_path_factory.mktemp("images") / f"{i}.png")
        picture(width, height).save(file)
        box = {"bbox": [i, 2, i + 9, 20], "bbox_mode": 0, "category_id": i % 2}
        size = {"width": width, "height": height}
        dicts.append({"file_name": file, "image_id": i, "annotations": [box], **size})
    DatasetCatalog.register("noise", lambda: dicts)
    yield "noise"
    DatasetCatalog.pop("noise")


def config(dataset, *options):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (dataset,)
    cfg.INPUT.MIN_SIZE_TRAIN = (20, 24, 28, 32)
    cfg.INPUT.CROP.ENABLED, cfg.SEED = True, 3
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 0
    cfg.merge_from_list(list(options))
    return cfg


def batches(cfg, count, start_iter=0):
    """Per iteration, (image_id, image, boxes) of each image and the random numbers of the step."""
    loader = TrainLoader(cfg, DatasetMapper(cfg, is_train=True))
    iterator = iter(loader)  # detectron2 0.5 does this before start_iter is known
    loader.start_iter = start_iter
    return [
        (
            [(d["image_id"], d["image"], d["instances"].gt_boxes.tensor) for d in batch],
            [torch.rand(1), np.random.rand()],
        )
        for batch in islice(iterator, count)
    ]


def equal(one, other):
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    return all(torch.equal(*map(torch.as_tensor, pair)) for pair in pairs)


@pytest.mark.parametrize("grouping", [True, False])
def test_batches_do_not_depend_on_start_or_workers(dataset, grouping):
    cfg = config(dataset, "DATALOADER.ASPECT_RATIO_GROUPING", grouping)
    expected = batches(cfg, 12)
    assert equal(batches(cfg, 5, start_iter=7), expected[7:])
    cfg.DATALOADER.NUM_WORKERS = 2
    assert equal(batches(cfg, 5, start_iter=7), expected[7:])
    seen = {}  # each image in several epochs
    for image_id, image, _ in (image for batch, _ in expected for image in batch):
        seen.setdefault(image_id, []).append(image)
    assert len(seen) == 7
    assert any(not equal(images[0], image) for images in seen.values() for image in images)


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_batches_depend_on_the_seed(dataset, sampler):
    options = ["DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", 0.9]
    first, same, other, drawn = (
        batches(config(dataset, *options, "SEED", seed), 4) for seed in (3, 3, 4, -1)
    )
    assert equal(first, same) and not equal(first, other) and not equal(first, drawn)


def test_images_and_their_order_are_those_of_detectron2(dataset):
    cfg = config(dataset)
    np.random.seed(cfg.SEED)  # detectron2 0.5 draws the seed of the order from NumPy
    theirs = build_detection_train_loader(cfg, mapper=lambda d: d)
    ours = [[image_id for image_id, *_ in batch] for batch, _ in batches(cfg, 12)]
    assert [[d["image_id"] for d in batch] for batch in islice(theirs, 12)] == ours
    for batch in ours:
        assert len({width > height for width, height in (SIZES[i] for i in batch)}) == 1


def test_processes_share_the_batch_of_one_process(dataset, monkeypatch):
    cfg = config(dataset, "DATALOADER.ASPECT_RATIO_GROUPING", False, "SOLVER.IMS_PER_BATCH", 4)
    alone = batches(cfg, 6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(detectron2.data.build, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather", lambda value: [value])
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(batches(cfg, 6))
    for (images, _), (first, drawn), (second, drawn_too) in zip(alone, *shares):
        assert equal([first[0], second[0], first[1], second[1]], images)
        assert not equal(drawn, drawn_too)


def fail(dataset_dict):
    raise ValueError("broken\nimage")


READ = DatasetMapper(get_cfg(), is_train=True)


@pytest.mark.parametrize(
    "save, mapper, workers, reason",
    [
        (lambda path: path.write_bytes(b""), READ, 0, "cannot identify image file"),
        (lambda path: path.mkdir(), READ, 1, "Is a directory"),
        (lambda path: picture(1, 5000).save(path), READ, 0, "height and width must be > 0"),
        (lambda path: picture(50, 50).save(path), READ, 0, r"got \(50, 50\), expect \(96"),
        (lambda path: None, fail, 1, r"\(ValueError: broken image\)"),
    ],
)
def test_error_names_the_image(tmp_path, save, mapper, workers, reason):
    path = tmp_path / "a.jpg"
    save(path)
    dataset_dict = {"file_name": str(path), "annotations": []}
    if "50" in reason:
        dataset_dict.update(width=96, height=64)
    loader = ImageLoader(mapper, [[(dataset_dict, None)]], num_workers=workers)
    with pytest.raises(ImageError) as error:
        next(iter(loader))
    assert re.match(f"{path} cannot be used .*{reason}", str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
