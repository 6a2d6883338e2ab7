"""From parsed arguments to a training or an evaluation, in one process or several."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path
from typing import Optional

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
from .setup import find_config_file, load_config
from .signals import forward_signals
from .trainer import Trainer

# torchrun sets these in each process that it starts.
TORCHRUN_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


def main(
    args: Namespace,
    *,
    trainer: type[Trainer] = Trainer,
    add_config: Optional[Callable[[CfgNode], None]] = None,
) -> Optional[dict]:
    """Train or evaluate in the processes that ``args`` asks for; under torchrun, in this one.

    Args:
        args: from :func:`argument_parser`, or, if only configs name datasets, from detectron2's.
        trainer: class that trains and evaluates; a project passes its own subclass.
        add_config: function that adds the config keys of a project.

    Returns:
        What :func:`run` returns, if it was called in this process.
    """
    with exit_on_user_error(), torchrun_process_group(args):
        args.config_file = find_config_file(args.config_file)
        custom = read_datasets(args) if hasattr(args, "train_json") else {}
        cfg = load_config(
            args.config_file, args.opts, overrides=overrides(custom), add_config=add_config
        )
        datasets = list(custom.values())
        for dataset in datasets:
            dataset.register()
        datasets = check_input(cfg, args, datasets, trainer.check_datasets)
        if args.num_gpus * args.num_machines <= 1:
            return run(cfg, args, trainer=trainer)
        try:
            with forward_signals(active_children):
                launch(
                    _run_spawned,
                    args.num_gpus,
                    num_machines=args.num_machines,
                    machine_rank=args.machine_rank,
                    dist_url=args.dist_url,
                    args=(cfg, args, datasets, trainer),
                )
        except ProcessExitedException as error:
            if error.exit_code != EXIT_STATUS:
                raise
            sys.exit(EXIT_STATUS)  # the process has printed its error


def _run_spawned(*args) -> None:
    with exit_on_user_error():
        run(*args)


def run(
    cfg: CfgNode,
    args: Namespace,
    datasets: Sequence[CustomDataset] = (),
    trainer: type[Trainer] = Trainer,
) -> Optional[dict]:
    """Train or evaluate in this process, which may be one of several; return the results.

    ``datasets`` are those that this process has yet to register. After a training,
    there are results only with TEST.EXPECTED_RESULTS.
    """
    for dataset in datasets:
        dataset.register()
    cfg = _set_up(cfg, args)
    if not args.eval_only:
        training = trainer(cfg)
        training.resume_or_load(resume=args.resume)
        return training.train()

    model = trainer.build_model(cfg)
    checkpointer = trainer.build_checkpointer(cfg, model)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _set_up(cfg: CfgNode, args: Namespace) -> CfgNode:
    """Set up logging and random numbers, and write config.yaml; return the config with a SEED.

    detectron2's default_setup also prints a table, with alarming lines about a missing GPU.
    """
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    if not args.eval_only:
        cfg = choose_seed(cfg, args.resume)
    rank = comm.get_rank()
    for name in ("fvcore", "detectron2", "nl_detectron"):
        logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    logger.info(f"Process {rank}, {environment()}, {args}")
    if comm.is_main_process():
        with write_atomically(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "w") as file:
            file.write(cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only
    return cfg


def choose_seed(cfg: CfgNode, resume: bool) -> CfgNode:
    """Replace a negative SEED by a random number, the same in all processes.

    If ``resume`` is True, use the seed in the environment.json of OUTPUT_DIR, if there is one.
    """
    if cfg.SEED >= 0:
        return cfg
    seed = comm.shared_random_seed()
    path = Path(cfg.OUTPUT_DIR, "environment.json")
    if resume and path.exists():
        seed = json.loads(path.read_text())["seed"]
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = comm.all_gather(seed)[0]  # other machines may not see the file
    cfg.freeze()
    return cfg


@contextmanager
def torchrun_process_group(args: Namespace) -> Iterator[None]:
    """Join the process group if torchrun started this process, and leave it after the body.

    The backend is NCCL with one GPU per process, or Gloo if torch finds no GPU. Do nothing unless
    all of TORCHRUN_VARIABLES are in the environment.
    """
    if not all(name in os.environ for name in TORCHRUN_VARIABLES):
        yield
        return

    gpus = torch.cuda.device_count()
    dist.init_process_group("nccl" if gpus else "gloo", timeout=DEFAULT_TIMEOUT)
    comm.all_gather(None)  # without it, an early exit of one process would fail the others' joining
    if args.num_gpus > 1 or args.num_machines > 1:
        raise UserError("--num-gpus, --num-machines: use torchrun's --nproc-per-node and --nnodes")
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
    else:  # release 0.5 has no function for it
        comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(local_size)
    comm.synchronize()
    yield
    # After an error the group stays, because exit_on_user_error uses its store.
    dist.destroy_process_group()
