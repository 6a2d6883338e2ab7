"""TrainLoader: the batch of an iteration is the same wherever one begins and whoever loads it."""

from itertools import islice

import detectron2.data.build
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_train_loader
from detectron2.utils import comm
from PIL import Image

from nl_detectron.data.train_loader import TrainLoader

SIZES = [(40, 30), (30, 40), (50, 30), (30, 50), (44, 30), (60, 30), (30, 36)]  # wide and tall


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The name of a dataset of 7 images of noise, each with a box of its own."""
    folder = tmp_path_factory.mktemp("images")
    dicts = []
    for i, (width, height) in enumerate(SIZES):
        file = folder / f"{i}.png"
        noise = np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(file)
        box = {"bbox": [i, 2, i + 9, 20], "bbox_mode": 0, "category_id": i % 2}
        size = {"width": width, "height": height}
        dicts.append({"file_name": str(file), "image_id": i, "annotations": [box], **size})
    DatasetCatalog.register("noise", lambda: dicts)
    yield "noise"
    DatasetCatalog.pop("noise")


def config(dataset, *options):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (dataset,)
    cfg.INPUT.MIN_SIZE_TRAIN = (20, 24, 28, 32)
    cfg.INPUT.CROP.ENABLED = True  # beside the random flip, which is detectron2's default
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 3
    cfg.merge_from_list(list(options))
    return cfg


def batches(cfg, count, start_iter=0):
    """Of some iterations: [(image_id, image, boxes) of each image], and what the step draws."""
    loader = TrainLoader(cfg, DatasetMapper(cfg, is_train=True))
    iterator = iter(loader)  # release 0.5 does this before it knows where to start
    loader.start_iter = start_iter
    return [
        (
            [(d["image_id"], d["image"], d["instances"].gt_boxes.tensor) for d in batch],
            [torch.rand(1), np.random.rand()],
        )
        for batch in islice(iterator, count)
    ]


def equal(one, other):
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


@pytest.mark.parametrize("grouping", [True, False])
def test_the_same_from_any_iteration_on_with_any_number_of_workers(dataset, grouping):
    cfg = config(dataset, "DATALOADER.ASPECT_RATIO_GROUPING", grouping)
    all_of_them = batches(cfg, 12)
    with_workers = config(
        dataset, "DATALOADER.ASPECT_RATIO_GROUPING", grouping, "DATALOADER.NUM_WORKERS", 3
    )
    assert equal(batches(with_workers, 12), all_of_them)
    assert equal(batches(cfg, 5, start_iter=7), all_of_them[7:])
    assert equal(batches(with_workers, 5, start_iter=7), all_of_them[7:])


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_the_seed_decides(dataset, sampler):
    options = ["DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", 0.9]
    first = batches(config(dataset, *options), 4)
    assert equal(batches(config(dataset, *options), 4), first)
    assert not equal(batches(config(dataset, *options, "SEED", 4), 4), first)
    assert not equal(batches(config(dataset, *options, "SEED", -1), 4), first)


def test_an_image_is_augmented_otherwise_each_time(dataset):
    images = {}
    for batch, _ in batches(config(dataset), 40):
        for image_id, image, _ in batch:
            images.setdefault(image_id, []).append(image)
    assert sorted(images) == list(range(7))
    for seen in images.values():
        assert sum(not equal(seen[0], image) for image in seen[1:]) > len(seen) / 2


def test_the_images_are_those_of_detectron2(dataset):
    """In the same order, grouped alike: only what is drawn for an image is ours."""
    cfg = config(dataset)
    np.random.seed(cfg.SEED)  # by which release 0.5 chooses the order
    theirs = build_detection_train_loader(cfg, mapper=lambda d: d)
    ours = batches(cfg, 12)
    assert [[d["image_id"] for d in batch] for batch in islice(theirs, 12)] == [
        [image_id for image_id, *_ in batch] for batch, _ in ours
    ]
    for batch, _ in ours:
        assert len({width > height for width, height in (SIZES[i] for i, *_ in batch)}) == 1


def test_processes_share_the_batch_of_one(dataset, monkeypatch):
    cfg = config(dataset, "DATALOADER.ASPECT_RATIO_GROUPING", False, "SOLVER.IMS_PER_BATCH", 4)
    alone = batches(cfg, 6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(detectron2.data.build, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather", lambda value: [value])
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(batches(cfg, 6))
    for (images, _), (first, drawn), (second, otherwise) in zip(alone, *shares):
        assert equal([first[0], second[0], first[1], second[1]], images)
        assert not equal(drawn, otherwise)
