"""Run a training or an evaluation from parsed arguments, in one process or several."""

import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import DEFAULT_TIMEOUT, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from ..data.coco import CustomDataset, overrides, read_datasets
from ..errors import EXIT_STATUS, UserError, exit_on_user_error
from ..files import write_atomically
from .checks import check_input
from .hooks import environment
from .setup import load_config
from .signals import forward_signals
from .trainer import Trainer

# torchrun sets these in each process that it starts.
TORCHRUN_VARIABLES = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()


def main(
    args: Namespace, *, trainer: type[Trainer] = Trainer, add_config: Callable | None = None
) -> dict | None:
    """Train or evaluate in the processes that ``args`` asks for; under torchrun, in this one.

    Args:
        args: from :func:`argument_parser`, or from detectron2's, without flags for custom data.
        trainer: class that trains and evaluates; a project passes its own subclass.
        add_config: function that adds the config keys of a project.
    """
    with exit_on_user_error(), torchrun_process_group(args):
        custom = read_datasets(args) if hasattr(args, "train_json") else {}
        changes = overrides(custom)
        cfg = load_config(args.config_file, args.opts, overrides=changes, add_config=add_config)
        datasets = check_input(cfg, args, list(custom.values()), trainer.check_datasets)
        job = (cfg, args, datasets, trainer)
        if args.num_gpus * args.num_machines <= 1:
            return run(*job)
        try:
            with forward_signals(active_children):
                launch(run, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, job)
        except ProcessExitedException as error:
            if error.exit_code != EXIT_STATUS:
                raise
            sys.exit(EXIT_STATUS)  # the process has printed its error


@exit_on_user_error()  # again, for a process that launch() has started
def run(
    cfg: CfgNode, args: Namespace, datasets: Sequence[CustomDataset], trainer: type[Trainer]
) -> dict | None:
    """Train or evaluate in this process, which may be one of several; return the results."""
    for dataset in datasets:
        dataset.register()
    _set_up(cfg, args)
    if not args.eval_only:
        training = trainer(cfg)
        training.resume_or_load(resume=args.resume)
        return training.train()
    model = trainer.build_model(cfg)
    trainer.build_checkpointer(cfg, model).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _set_up(cfg: CfgNode, args: Namespace) -> None:
    """Set up logging and random numbers, choose a SEED if it is negative, and write config.yaml."""
    # detectron2's default_setup would print alarming lines about a missing GPU.
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    if cfg.SEED < 0 and not args.eval_only:
        cfg.defrost()
        cfg.SEED = choose_seed(cfg.OUTPUT_DIR, args.resume)
        cfg.freeze()
    rank = comm.get_rank()
    for name in ("fvcore", "detectron2", "nl_detectron"):
        logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)
    logger.info(f"Process {rank}, {environment()}, {args}")
    if comm.is_main_process():
        with write_atomically(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "w") as file:
            file.write(cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only


def _without_traceback(record: logging.LogRecord) -> bool:
    """Shorten detectron2's report of a UserError, because exit_on_user_error prints it."""
    if record.exc_info and isinstance(record.exc_info[1], UserError):
        record.msg, record.exc_info = f"{record.msg} {record.exc_info[1]}", None
    return True


def choose_seed(output_dir: str, resume: bool) -> int:
    """Return a random seed or, to resume, that of the earlier start."""
    seed = comm.shared_random_seed()
    path = Path(output_dir, "environment.json")
    if resume and path.exists():
        seed = json.loads(path.read_text())["seed"]
    return comm.all_gather(seed)[0]  # other machines may not see the file


@contextmanager
def torchrun_process_group(args: Namespace) -> Iterator[None]:
    """If torchrun started this process, join the process group, and leave it after the body.

    The backend is NCCL with one GPU per process, or Gloo if torch finds no GPU.
    """
    if not all(name in os.environ for name in TORCHRUN_VARIABLES):
        yield
        return
    gpus = torch.cuda.device_count()
    dist.init_process_group("nccl" if gpus else "gloo", timeout=DEFAULT_TIMEOUT)
    comm.all_gather(None)  # otherwise the others could not join if one process exits early
    if args.num_gpus > 1 or args.num_machines > 1:
        raise UserError("--num-gpus, --num-machines: use torchrun's --nproc-per-node and --nnodes")
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # As comm.create_local_process_group, which release 0.5 does not have.
    comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(int(os.environ["LOCAL_WORLD_SIZE"]))
    yield
    # After an error the group stays, because exit_on_user_error uses its store.
    dist.destroy_process_group()
