"""What ``train_net.py`` and the tools share: set-up, checks, the trainer, the launch."""

from .errors import UserError, exit_on_user_error
from .launch import main, run
from .record import RunRecord
from .setup import argument_parser, load_config
from .trainer import Trainer

__all__ = [
    "RunRecord",
    "Trainer",
    "UserError",
    "argument_parser",
    "exit_on_user_error",
    "load_config",
    "main",
    "run",
]
