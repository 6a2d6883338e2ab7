"""Helpers for tests of the engine: the tiny config, and train_net.py in this process."""

import pytest
from helpers import TINY

from nl_detectron.engine import argument_parser, load_config, main

DATA = ["DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)"]


@pytest.fixture
def train_net(datasets):
    """Run train_net.py in this process, on the tiny config and data."""

    def run(*options, flags=()):
        args = ["--config-file", TINY, *flags, *DATA, *options]
        return main(argument_parser().parse_args(args))

    return run


@pytest.fixture
def error_of(capsys):
    """Return the one line on stderr with which a function exits with status 2."""

    def call(function, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            function(*arguments)
        assert exit_info.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1, line
        return line

    return call


@pytest.fixture
def tiny_config(datasets, tmp_path):
    """Return the tiny config with options, on the tiny data and with OUTPUT_DIR tmp_path."""
    return lambda *options: load_config(TINY, [*DATA, "OUTPUT_DIR", str(tmp_path), *options])
