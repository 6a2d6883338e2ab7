"""What holds for every test, and the data that several share and none changes."""

import logging

import pytest
from detectron2.data.datasets import register_coco_instances

from nl_detectron.data import generate


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    """A DETECTRON2_DATASETS with 8 + 4 images; in this process their names are tiny_train, _val."""
    folder = tmp_path_factory.mktemp("datasets")
    root = generate(folder / "nl_synthetic", {"train": 8, "val": 4})
    for split in ("train", "val"):
        register_coco_instances(f"tiny_{split}", {}, str(root / f"{split}.json"), str(root / split))
    return folder


@pytest.fixture(autouse=True)
def no_logging_to_closed_streams():
    """Loggers outlive the test that set them up, and its captured streams.

    What they log later would put "Logging error" on stderr, in the middle of what a test reads.
    """
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in list(getattr(logger, "handlers", ())):
            if getattr(getattr(handler, "stream", None), "closed", False):
                logger.removeHandler(handler)
