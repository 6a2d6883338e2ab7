"""Parse the command line, load the config, and build a predictor."""

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultPredictor, default_argument_parser

from ..checkpoint import AuditedCheckpointer
from ..config import add_nonlocal_config, get_config_file
from ..data.coco import add_data_arguments
from ..errors import UserError

# Exceptions that yacs raises for a key or a value that does not fit.
MERGE_ERRORS = (AssertionError, AttributeError, KeyError, TypeError, ValueError)


def argument_parser() -> argparse.ArgumentParser:
    """Return detectron2's parser, with flags for custom data in COCO's format."""
    parser = default_argument_parser()
    parser.description = "FILE is a path, or the name of a config that comes with nl_detectron."
    add_data_arguments(parser)
    return parser


def find_config_file(name: str) -> str:
    """Return ``name`` if it is a file or "", else the path of the shipped config of that name."""
    if not name or os.path.isfile(name):
        return name
    try:
        return get_config_file(name)
    except FileNotFoundError as error:
        raise UserError(f"--config-file: no file {os.path.abspath(name)}, and {error}") from error


def load_config(
    config_file: str = "", opts: Sequence = (), *, overrides: Sequence = (), add_config=None
) -> CfgNode:
    """Load a config file, or the shipped config of that name, and options over the defaults.

    MODEL.DEVICE is "cpu" if torch finds no GPU, unless the file or an option sets it. Raise a
    UserError if a key or a value does not fit.

    Args:
        opts: ``KEY VALUE KEY VALUE ...``, as on the command line.
        overrides: the same, but set by the program; the options take precedence.
        add_config: function that adds the keys of a project to the defaults.
    """
    cfg = get_cfg()
    add_nonlocal_config(cfg)
    if add_config:
        add_config(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if config_file:
        _merge_file(cfg, find_config_file(config_file))
    cfg.merge_from_list(list(overrides))
    try:
        cfg.merge_from_list(list(opts))
    except MERGE_ERRORS as error:
        problem = _find_problem(cfg, zip(opts[::2], opts[1::2])) or error
        raise UserError(f"command line: {problem}") from error
    cfg.freeze()
    return cfg


def _merge_file(cfg: CfgNode, path: str) -> None:
    items = []
    try:
        items = list(_flatten(CfgNode.load_yaml_with_base(path, allow_unsafe=True)))
        cfg.merge_from_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no file {os.path.abspath(error.filename)} (_BASE_)") from error
    except (yaml.YAMLError, *MERGE_ERRORS) as error:
        expected = "YAML" if isinstance(error, yaml.YAMLError) else "nested config keys with values"
        problem = _find_problem(cfg, items) or f"not {expected}: {' '.join(str(error).split())}"
        if re.search(r"\{[^}]*\([^)]*,", Path(path).read_text()):
            problem += ". Inside { }, YAML ends a value at a comma: write a list, such as [224]"
        raise UserError(f"{path}: {problem}") from error


def _find_problem(cfg: CfgNode, items: Iterable[tuple[str, Any]]) -> str:
    """Describe the first key or value that ``cfg`` does not accept; return "" if there is none."""
    defaults = dict(_flatten(cfg))
    for key, value in items:
        if key not in defaults:
            close = difflib.get_close_matches(key, defaults, n=1)
            return f"{key} is not a config key" + (f"; did you mean {close[0]}?" if close else "")
        try:
            cfg.clone().merge_from_list([key, value])
        except MERGE_ERRORS:
            kind = type(defaults[key]).__name__
            example = ("NAME",) if defaults[key] == () else defaults[key]
            return f"{key} takes a value of type {kind}, such as {example!r}, not {value!r}"
    return ""


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each leaf of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def build_predictor(cfg: CfgNode) -> DefaultPredictor:
    """Build detectron2's predictor for BGR images, (H, W, 3) uint8, with audited MODEL.WEIGHTS."""
    without_weights = cfg.clone()
    without_weights.defrost()
    without_weights.MODEL.WEIGHTS = ""  # or DefaultPredictor would load the file without an audit
    predictor = DefaultPredictor(without_weights)
    AuditedCheckpointer(predictor.model, partial=cfg.MODEL.WEIGHTS_PARTIAL).load(cfg.MODEL.WEIGHTS)
    return predictor
