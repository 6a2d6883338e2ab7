"""What holds for every test."""

import logging

import pytest


@pytest.fixture(autouse=True)
def no_logging_to_closed_streams():
    """Loggers outlive the test that set them up, and its captured streams.

    What they log later would put "Logging error" on stderr, in the middle of what a test reads.
    """
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in list(getattr(logger, "handlers", ())):
            if getattr(getattr(handler, "stream", None), "closed", False):
                logger.removeHandler(handler)
