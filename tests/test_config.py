"""Config keys, and their names in errors."""

import pytest

from nl_detectron import add_nonlocal_config
from nl_detectron.config import config_hash, name_config_key
from nl_detectron.engine import load_config
from nl_detectron.errors import OptionError


def test_second_call_keeps_the_values():
    cfg = load_config(opts=["MODEL.NONLOCAL.NORM", "GN"])
    add_nonlocal_config(cfg)
    assert cfg.MODEL.NONLOCAL.NORM == "GN"


@pytest.mark.parametrize("keys, key", [({}, "MODEL.NONLOCAL.NORM"), ({"norm": "A.B"}, "A.B")])
def test_error_names_the_key(keys, key):
    with pytest.raises(OptionError) as error, name_config_key(**keys):
        raise OptionError("norm", "is bad")
    assert str(error.value) == f"{key} is bad"


def test_hash_ignores_seed_output_and_device():
    plain = config_hash(load_config())
    ignored = ("SEED", 3, "OUTPUT_DIR", "a", "MODEL.DEVICE", "cpu")
    assert config_hash(load_config(opts=ignored)) == plain
    assert config_hash(load_config(opts=["MODEL.NONLOCAL.REDUCTION", 4])) != plain
