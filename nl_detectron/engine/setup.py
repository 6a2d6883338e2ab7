"""From a command line to a frozen config."""

import argparse
import difflib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser

from ..config import add_nonlocal_config, get_config_file
from ..errors import UserError

EXAMPLES = """
examples:
  %(prog)s --config-file configs/Synthetic/mask_rcnn_R_18_FPN_NL.yaml
  %(prog)s --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_NL_1x.yaml --num-gpus 8
  %(prog)s --config-file FILE --eval-only MODEL.WEIGHTS model_final.pth
  %(prog)s --config-file FILE --train-json train.json --train-images train/ \\
      --test-json test.json --test-images test/

FILE is a path, or the name of a config that comes with nl_detectron.
"""


def argument_parser() -> argparse.ArgumentParser:
    """detectron2's own flags, and those for one's own data."""
    parser = default_argument_parser(epilog=EXAMPLES)
    group = parser.add_argument_group(
        "one's own data in COCO's format",
        "They take the place of the config's, and the class counts in it are set to theirs. "
        "Without test data nothing is evaluated; --eval-only needs test data only.",
    )
    for split in ("train", "test"):
        group.add_argument(f"--{split}-json", metavar="FILE", help="annotations")
        group.add_argument(f"--{split}-images", metavar="DIR", help="folder of their images")
    return parser


def find_config_file(name: str) -> str:
    """The path of a config: ``name`` itself, or else the shipped config of that name.

    Raises:
        UserError: there is neither.
    """
    if not name or os.path.isfile(name):
        return name
    try:
        return get_config_file(name)
    except FileNotFoundError as error:
        raise UserError(f"--config-file: no file {os.path.abspath(name)}, and {error}") from error


def load_config(
    config_file: str = "", opts: Sequence[str] = (), *, overrides: Sequence[Any] = ()
) -> CfgNode:
    """detectron2's defaults and this package's, then a config file, then options.

    MODEL.DEVICE is the CPU where torch finds no GPU, unless the file or an option sets it.

    Args:
        config_file: path of a yaml file; "" for none.
        opts: ``KEY VALUE KEY VALUE ...``.
        overrides: the same, known to be right; they come before the options.

    Returns:
        The config, frozen.

    Raises:
        UserError: a file is missing or not YAML, a key does not exist, a value has the wrong type.
    """
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if config_file:
        with _explain(cfg, config_file):
            cfg.merge_from_file(config_file)
    cfg.merge_from_list(list(overrides))
    if len(opts) % 2:
        raise UserError(
            "options after the flags are pairs, KEY VALUE, and flags come before them; "
            f"these are {len(opts)}: {' '.join(opts)}"
        )
    with _explain(cfg, "command line"):
        cfg.merge_from_list(list(opts))
    cfg.freeze()
    return cfg


@contextmanager
def _explain(cfg: CfgNode, source: str) -> Iterator[None]:
    """Restate what merging into ``cfg`` raises on bad input; ``source`` is where it came from."""
    try:
        yield
    except FileNotFoundError as error:  # only a _BASE_, since the file itself has been found
        missing = os.path.abspath(error.filename)
        raise UserError(f"{source}: its _BASE_ does not exist: {missing}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    except (AttributeError, TypeError) as error:  # of an empty file, or of a list
        raise UserError(f"{source}: not a mapping of config keys to values ({error})") from error
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"{source}: {_restate(str(error.args[0]), cfg)}") from error


def _restate(message: str, cfg: CfgNode) -> str:
    """What yacs says about a key, with what would be right."""
    problem, _, key = message.rpartition("key: ")
    if problem.startswith("Non-existent"):
        close = difflib.get_close_matches(key, _keys(cfg), n=1)
        if close == [key]:
            return f"there is no key {key!r} with dots; nest it: {key.replace('.', ': {')}: ..."
        return f"there is no key {key}" + (f"; did you mean {close[0]}?" if close else "")
    if problem.startswith("Type mismatch"):
        value = cfg
        for part in key.split("."):
            value = value[part]
        if isinstance(value, CfgNode):
            return f"{key} is not a key but a group of keys: {', '.join(sorted(value))}"
        example = ("x",) if value == () else value  # most of the empty tuples are of names
        return f"{key} takes a value of type {type(value).__name__}, such as {example!r}"
    return message


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
