"""Processes that torchrun has started, and what several processes need on a CPU.

Those that ``--num-gpus`` asks for are detectron2's ``launch``'s business. After the start there is
no difference between the two: detectron2 asks ``comm`` how many there are.
"""

import argparse
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import detectron2.utils.comm as comm
import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT, create_ddp_model, defaults

from ..errors import UserError

# What torchrun gives to each process that it starts.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size(args: argparse.Namespace) -> int:
    """How many processes a run has: torchrun's, or those that ``launch`` is going to start."""
    return max(comm.get_world_size(), args.num_gpus * args.num_machines)


@contextmanager
def processes_of_torchrun(args: argparse.Namespace) -> Iterator[None]:
    """Join this process with the others of its run, if torchrun (or anything alike) started it.

    They talk by NCCL where torch finds a GPU, one GPU for each process, and by Gloo elsewhere. With
    none of VARIABLES, or only some, in the environment, nothing happens.

    Raises:
        UserError: ``args`` ask for processes too, or this machine has more of them than GPUs.
    """
    if not all(name in os.environ for name in VARIABLES):
        yield
        return

    # The timeout is for peers that are alive and busy, such as one that evaluates. That a peer died
    # is seen at once: the connection closes, and torchrun ends all processes when one fails.
    gpus = torch.cuda.device_count()
    dist.init_process_group("nccl" if gpus else "gloo", timeout=DEFAULT_TIMEOUT)
    comm.all_gather(None)  # who ended with an error before all are here would take the others along
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if args.num_gpus > 1 or args.num_machines > 1:
        raise UserError(
            f"torchrun has started {dist.get_world_size()} processes; leave out --num-gpus and "
            "--num-machines, torchrun's --nproc-per-node and --nnodes stand for them"
        )
    if gpus:
        if local_size > gpus:
            raise UserError(
                f"torchrun has started {local_size} processes on a machine where torch finds "
                f"{gpus} GPUs; --nproc-per-node can be {gpus} at most"
            )
        torch.cuda.set_device(local_rank)
    _create_local_process_group(local_size)
    comm.synchronize()
    yield
    dist.destroy_process_group()


def _create_local_process_group(size: int) -> None:
    """What ``comm.get_local_rank`` asks; ``size`` is that of each machine."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
    else:  # release 0.5, where only launch could make it
        comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(size)


@contextmanager
def ddp_on(device: str) -> Iterator[None]:
    """Let DefaultTrainer wrap its model, on ``device``, for several processes.

    It always names a GPU to DistributedDataParallel, which refuses that for a model on the CPU.
    """
    if device != "cpu":
        yield
        return
    create = functools.partial(create_ddp_model, device_ids=None)
    with mock.patch.object(defaults, "create_ddp_model", create):
        yield


def check_same_start(iteration: int) -> None:
    """Compare the iteration that each process is going to start from.

    Raises:
        UserError: in every process, if they differ.
    """
    iterations = comm.all_gather(iteration)
    if len(set(iterations)) > 1:
        raise UserError(
            f"--resume: the processes would start from the iterations {iterations}; "
            "OUTPUT_DIR has to be a folder that all machines share"
        )
