"""Config keys, their names in errors, and the search for config files."""

import pytest

from nl_detectron import add_nonlocal_config, get_config_file
from nl_detectron.config import block_options, config_hash, name_config_key
from nl_detectron.engine import load_config
from nl_detectron.errors import OptionError
from nl_detectron.layers import NonLocalBlock


def test_second_call_keeps_the_values():
    cfg = load_config(opts=["MODEL.NONLOCAL.NORM", "GN"])
    add_nonlocal_config(cfg)
    assert cfg.MODEL.NONLOCAL.NORM == "GN"


def test_defaults_of_the_config_are_those_of_the_block():
    assert repr(NonLocalBlock(8, **block_options(load_config()))) == repr(NonLocalBlock(8))


def test_error_names_the_key():
    with pytest.raises(OptionError, match="^MODEL.NONLOCAL.NORM is bad") as error:
        with name_config_key():
            raise OptionError("norm", "is bad")
    assert error.value.option == "MODEL.NONLOCAL.NORM"
    with pytest.raises(OptionError, match="^SOLVER.X is bad"):
        with name_config_key(factor="SOLVER.X"):
            raise OptionError("factor", "is bad")


def test_hash_ignores_seed_output_and_device():
    plain = config_hash(load_config())
    assert len(plain) == 12
    ignored = ("SEED", 3, "OUTPUT_DIR", "a", "MODEL.DEVICE", "cpu")
    assert config_hash(load_config(opts=ignored)) == plain
    assert config_hash(load_config(opts=["MODEL.NONLOCAL.REDUCTION", 4])) != plain


def test_unknown_config_file():
    with pytest.raises(FileNotFoundError, match="'mask_rcnn.yaml'.*Base-RCNN-FPN.yaml, Base-Ret"):
        get_config_file("mask_rcnn.yaml")
