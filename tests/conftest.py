"""Fixtures that several folders of tests use."""

import logging

import pytest
from detectron2.data.datasets import register_coco_instances

from nl_detectron.data import generate


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """Return a DETECTRON2_DATASETS with 8 + 4 images; register them as tiny_train and tiny_val."""
    folder = tmp_path_factory.mktemp("datasets")
    root = generate(folder / "nl_synthetic", {"train": 8, "val": 4})
    for split in ("train", "val"):
        register_coco_instances(f"tiny_{split}", {}, str(root / f"{split}.json"), str(root / split))
    return folder


@pytest.fixture(autouse=True)
def no_logging_to_closed_streams():
    """Remove the handlers of earlier tests, which would print "Logging error" on stderr."""
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in list(getattr(logger, "handlers", ())):
            if getattr(getattr(handler, "stream", None), "closed", False):
                logger.removeHandler(handler)
