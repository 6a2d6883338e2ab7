"""Reading a file of weights, wherever it comes from, without running what may be hidden in it."""

import io
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from ..errors import UserError

# torch's own variable: the one way to have a file read that is more than data, .pth and .pkl alike.
# It is no config key, since a config may come from the same stranger as the file.
TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

# What unpickling may call: it makes arrays and tensors, and nothing else happens.
HARMLESS = {
    "_codecs.encode",
    "collections.OrderedDict",
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"numpy.{core}.{name}"  # before NumPy 2, and since
        for core in ("core", "_core")
        for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
    ),
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
}


class LoadError(UserError):
    """A file of weights is damaged, foreign, would run code, or does not fit the model."""


class _Refused(Exception):
    """The name of what unpickling would have called."""


def read_checkpoint(path: str) -> dict:
    """Read a file of weights and check that it has some.

    Args:
        path: of a .pth, .pkl or .pyth file, in any of the formats that detectron2 loads.

    Returns:
        What is in the file.

    Raises:
        LoadError: as :func:`read_file` does; or the file holds something else than weights, or a
            value among them is not finite. The message names the file and the key.
    """
    content = read_file(path)
    if not isinstance(content, Mapping):
        raise LoadError(f"{path} holds no weights, but an object of type {type(content).__name__}")
    # As detectron2 has it: its own files and its zoo's, Detectron's, pycls's, or nothing around.
    keys = [key for key in ("model", "blobs", "model_state") if key in content]
    weights = content[keys[0]] if keys else content
    if not isinstance(weights, Mapping) or not weights:
        raise LoadError(f"{path} holds no weights" + (f" under {keys[0]!r}" if keys else ""))
    bad = []
    for name, value in weights.items():
        if not isinstance(value, (np.ndarray, torch.Tensor)):
            raise LoadError(
                f"{path} is not in a format of detectron2: {name!r} in it is of type "
                f"{type(value).__name__}, and no tensor; tools/convert_weights.py "
                "converts files of mmdet, mmaction2 and video-nonlocal-net"
            )
        finite = np.isfinite(value) if isinstance(value, np.ndarray) else torch.isfinite(value)
        if not finite.all():
            bad.append(name)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise LoadError(f"{path} has values that are NaN or infinite in {bad[0]!r}{more}")
    return content


def read_file(path: str) -> Any:
    """Read what ``torch.save`` or pickle wrote: tensors, arrays, plain Python values.

    Anything else is refused, for unpickling it would call what the file names. It is read all the
    same where the environment has TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1.

    Args:
        path: a name that ends in .pkl is read by pickle, every other by torch.

    Raises:
        LoadError: the file is damaged, is of another kind, or asks for more; the message names the
            file, what it asks for, and how to allow it.
    """
    trusted = os.environ.get(TRUST, "0").lower() in ("1", "y", "yes", "true")  # as torch has it
    try:
        if path.endswith(".pkl"):
            with open(path, "rb") as file:
                return (pickle.Unpickler if trusted else _Unpickler)(file, encoding="latin1").load()
        _check_sums(path)
        with harmless_globals():
            return torch.load(path, map_location="cpu", weights_only=not trusted)
    except Exception as error:  # what unpickling a damaged file raises can be anything
        asked = _asked_for(error)
        if asked:
            raise LoadError(
                f"{path} is refused, since loading it may run code: it asks for {asked}, and "
                "weights need nothing but tensors, arrays and plain values. For a file that you "
                f"trust, set the environment variable {TRUST}=1"
            ) from error
        raise LoadError(f"{path} cannot be read as a checkpoint ({_reason(error)})") from error


def harmless_globals():
    """A context in which torch takes arrays and scalars of NumPy for data, as they are."""
    names = [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in np.sctypeDict.values()}]
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    names += [multiarray._reconstruct, multiarray.scalar]
    # Before 2.5 torch had no such context, and refuses these.
    return getattr(torch.serialization, "safe_globals", nullcontext)(names)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_from_bytes  # torch's own allows everything within
        if f"{module}.{name}" not in HARMLESS:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


def _load_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _check_sums(path: str) -> None:
    """torch writes check sums into its archives, but does not compare them when it reads."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the check sum of {damaged} in it is wrong")


def _asked_for(error: Exception) -> str:
    if isinstance(error, _Refused):
        return str(error)
    match = re.search(r"(?:GLOBAL|class) ([\w.]+\.\w+)", str(error))
    return match[1] if match and isinstance(error, pickle.UnpicklingError) else ""


def _reason(error: Exception) -> str:
    # torch explains at length what may be done; its first sentence says what is wrong.
    detail = re.search(r"WeightsUnpickler error:\s*(.*)", str(error))
    message = detail[1] if detail else f"{type(error).__name__}: {error}"
    return re.split(r"\n|\. (?=[A-Z])", message)[0].rstrip(":. ")
