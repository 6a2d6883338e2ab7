"""Errors that are the user's to mend: a clear line in place of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

STATUS = 2  # the exit status, as argparse has for a bad command line


class UserError(Exception):
    """Something the user gave is wrong; the message names it and says what would be right."""


@contextmanager
def as_user_error(kind: type[Exception], about: str = "") -> Iterator[None]:
    """Restate an exception of that kind in the body as a UserError with the same message.

    Args:
        kind: of exceptions.
        about: how the message has to begin; others pass.
    """
    try:
        yield
    except kind as error:
        if not str(error).startswith(about):
            raise
        raise UserError(str(error)) from error


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with status 2 and one message on stderr if the body meets a UserError.

    Of several processes with the same message, one prints it. Every other exception passes: a fault
    of the program keeps its traceback.
    """
    try:
        yield
    except UserError as error:
        if _first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(STATUS)
    except ProcessExitedException as error:
        if error.exit_code != STATUS:
            raise
        sys.exit(STATUS)  # a worker process met one and has printed it


def _first_to_say(message: str) -> bool:
    """Whether no other process of the run has asked this before.

    By the store through which the processes found each other: it works also where the others go on
    and take no part in a collective operation.
    """
    if not dist.is_initialized():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add(message, 1) == 1
    except RuntimeError:  # the process that keeps the store is gone, and has said why
        return False
