"""Every LazyConfig has the model, the optimizer and the schedule of the yaml file beside it."""

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.solver import LRMultiplier, build_lr_scheduler, build_optimizer
from helpers import parameter_settings
from test_configs import CONFIGS, load

from nl_detectron.analysis import meta_model

NAMES = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("COCO-*/*.py"))
assert len(NAMES) == 9


def lazy(name):
    return LazyConfig.load(str(CONFIGS / name))


def yaml(name):
    return load(str(Path(name).with_suffix(".yaml")))


def lazy_without_weights(name):
    with torch.device("meta"):
        return instantiate(lazy(name).model).eval()


def plain_values(model):
    """Return every plain value in a model, such as a threshold or a loss weight."""
    found = {}
    for module_name, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (list, tuple)) or type(value).__name__ == "ListConfig":
                value = str(list(value))
            if isinstance(value, (bool, int, float, str)):
                found[f"{module_name}.{name}"] = value
    return found


def structure(model):
    """Return the type of every module, the shape of every tensor, and the trained parameters."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    shapes = [(name, tensor.shape) for name, tensor in model.state_dict().items()]
    return modules, shapes, [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", NAMES)
def test_same_model(name):
    expected, model = meta_model(yaml(name)), lazy_without_weights(name)
    assert plain_values(model) == plain_values(expected)
    assert structure(model) == structure(expected)


@pytest.mark.parametrize("name", NAMES)
def test_same_training(name):
    cfg, expected = lazy(name), yaml(name)
    assert cfg.train.init_checkpoint == expected.MODEL.WEIGHTS
    assert cfg.train.max_iter == expected.SOLVER.MAX_ITER
    assert cfg.dataloader.train.total_batch_size == expected.SOLVER.IMS_PER_BATCH
    assert cfg.dataloader.train.dataset.names == expected.DATASETS.TRAIN[0]
    assert cfg.dataloader.test.dataset.names == expected.DATASETS.TEST[0]
    resize = cfg.dataloader.train.mapper.augmentations[0]
    assert tuple(resize.short_edge_length) == expected.INPUT.MIN_SIZE_TRAIN

    model = cfg.optimizer.params.model = lazy_without_weights(name)
    optimizer, of_yaml = instantiate(cfg.optimizer), build_optimizer(expected, model)
    assert parameter_settings(optimizer, model) == parameter_settings(of_yaml, model)

    multiplier = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)
    scheduler = build_lr_scheduler(expected, of_yaml)
    before_end = (30001, 29999, 10001, 9999, 1)  # about the two steps of the schedule
    for iteration in (0, 500, 1000, *(cfg.train.max_iter - n for n in before_end)):
        multiplier.last_epoch = scheduler.last_epoch = iteration
        assert multiplier.get_lr()[0] == pytest.approx(scheduler.get_lr()[0], rel=1e-9)
