"""Training and evaluation: what ``train_net.py`` and the tools call."""

from .checks import check_nonlocal
from .launch import main, run
from .predictor import build_predictor
from .record import RunRecord, environment
from .setup import argument_parser, find_config_file, load_config
from .stop_on_signal import forward_signals
from .trainer import Trainer

__all__ = [
    "RunRecord",
    "Trainer",
    "argument_parser",
    "build_predictor",
    "check_nonlocal",
    "environment",
    "find_config_file",
    "forward_signals",
    "load_config",
    "main",
    "run",
]
