"""Errors that are the user's to mend: a clear line in place of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.multiprocessing import ProcessExitedException

STATUS = 2  # the exit status, as argparse has for a bad command line


class UserError(Exception):
    """Something the user gave is wrong; the message names it and says what would be right."""


@contextmanager
def as_user_error(kind: type[Exception]) -> Iterator[None]:
    """Restate an exception of that kind in the body as a UserError with the same message."""
    try:
        yield
    except kind as error:
        raise UserError(str(error)) from error


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with status 2 and one message on stderr if the body meets a UserError.

    Every other exception passes: a fault of the program keeps its traceback.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(STATUS)
    except ProcessExitedException as error:
        if error.exit_code != STATUS:
            raise
        sys.exit(STATUS)  # a worker process met one and has printed it
