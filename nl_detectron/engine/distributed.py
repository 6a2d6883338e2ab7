"""Process groups that torchrun starts; detectron2's ``launch`` handles those of ``--num-gpus``."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

import detectron2.utils.comm as comm
import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT

from ..errors import UserError

# torchrun sets these in each process that it starts.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def torchrun_process_group(args: argparse.Namespace) -> Iterator[None]:
    """Join the process group if torchrun started this process, and leave it after the body.

    The backend is NCCL with one GPU per process, or Gloo if torch finds no GPU. Do nothing unless
    all of VARIABLES are in the environment.
    """
    if not all(name in os.environ for name in VARIABLES):
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
