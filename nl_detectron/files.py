"""Write a file whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import UserError

PARTIAL = ".partial"  # after the name of a file that is being written


class SaveError(UserError):
    """A file could not be written."""


@contextmanager
def write_atomically(path: str, mode: str) -> Iterator[IO]:
    """Open a file that takes its name, and the place of one of that name, when it is on disk whole.

    Until then it is called ``path + PARTIAL``. If the body fails, that is removed; if the process
    is killed, it stays.

    Args:
        path: in a folder that exists.
        mode: "w" or "wb".

    Raises:
        SaveError: the system refuses; the message names the file and the reason.
    """
    partial = path + PARTIAL
    try:
        with open(partial, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name with nothing behind it
        os.replace(partial, path)
    except BaseException as error:
        Path(partial).unlink(missing_ok=True)
        cause = error  # torch.save may have another error for what file.write raises
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise SaveError(f"{path} could not be written ({cause.strerror})") from error
