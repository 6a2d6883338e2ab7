"""The config keys that are added, and the hash of a config."""

from nl_detectron import add_nonlocal_config
from nl_detectron.config import config_hash
from nl_detectron.engine import load_config


def test_second_call_keeps_the_values():
    cfg = load_config(opts=["MODEL.NONLOCAL.NORM", "GN"])
    add_nonlocal_config(cfg)
    assert cfg.MODEL.NONLOCAL.NORM == "GN"


def test_hash_ignores_seed_output_and_device():
    plain = config_hash(load_config())
    ignored = ("SEED", 3, "OUTPUT_DIR", "a", "MODEL.DEVICE", "cpu")
    assert config_hash(load_config(opts=ignored)) == plain
    assert config_hash(load_config(opts=["MODEL.NONLOCAL.REDUCTION", 4])) != plain
