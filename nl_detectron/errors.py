"""User errors, reported in one line without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

EXIT_STATUS = 2  # argparse exits with the same status on a bad command line


class UserError(Exception):
    """An error in the input of the user; the message names the input and says what is valid."""


class OptionError(UserError, ValueError):
    """A bad value of an argument or of a config key.

    Attributes:
        option: name of the argument, such as "reduction", or of the config key.
        problem: the rest of the message: the value, and what is valid.
    """

    def __init__(self, option: str, problem: str):
        super().__init__(f"{option} {problem}")
        self.option = option
        self.problem = problem


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exit with status 2 and one line on stderr if the body raises a UserError.

    If several processes of a distributed run raise the same error, one of them prints it.
    """
    try:
        yield
    except UserError as error:
        if _claim_report(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_STATUS)


def _claim_report(message: str) -> bool:
    """Return True in exactly one process, so that a message is printed once.

    The processes increment a counter in the key-value store of torch.distributed. A collective
    operation would wait for processes that did not fail.
    """
    if not dist.is_initialized():
        return True
    try:
        return dist.distributed_c10d._get_default_store().add(message, 1) == 1
    except RuntimeError:  # the process that hosts the store has exited, and has printed the error
        return False
