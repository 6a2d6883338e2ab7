"""Atomic writing of files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Union

from .errors import UserError


class SaveError(UserError):
    """A failure to write a file."""


@contextmanager
def write_atomically(path: Union[str, Path], mode: str) -> Iterator[IO]:
    """Open a file, in mode "w" (UTF-8) or "wb", that replaces ``path`` when it is complete.

    If the body raises, ``path`` does not change. An OSError is raised as a SaveError.
    """
    partial = Path(f"{path}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the data must be on disk before the renaming
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        cause = error  # torch.save can replace the OSError by an error of its own
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise SaveError(f"{path} cannot be written ({cause.strerror})") from error
