"""Training and evaluation: everything behind ``train_net.py``."""

from .checks import check_nonlocal
from .hooks import environment
from .launch import main, run
from .setup import argument_parser, build_predictor, find_config_file, load_config
from .signals import forward_signals
from .trainer import Trainer
