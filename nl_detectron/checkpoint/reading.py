"""Read checkpoint files without executing code in them."""

import io
import os
import pickle
import re
import zipfile
from contextlib import nullcontext
from typing import IO, Any

import numpy as np
import torch

from ..errors import UserError

# PyTorch's variable that allows pickles to run code. A config key may come with the checkpoint.
TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
HINT = (
    ". Only tensors, arrays and plain values are read, because loading anything else can run code; "
    f"if you trust the file, set the environment variable {TRUST}=1"
)
# Names to which a .pkl file may refer; NumPy 2 renamed numpy.core to numpy._core.
SAFE_GLOBALS = re.compile(
    r"_codecs\.encode|collections\.OrderedDict|numpy\.dtype|numpy\.ndarray"
    r"|numpy\._?core\.(multiarray\._reconstruct|multiarray\.scalar|numeric\._frombuffer)"
    r"|torch\._utils\.(_rebuild_parameter|_rebuild_tensor_v2)"
)


class LoadError(UserError):
    """A mismatch of a checkpoint with the model or the training."""


class ReadError(LoadError):
    """A file that is missing or damaged, is not a checkpoint, or would run code when loaded."""


def read_checkpoint(path: str) -> dict:
    """Read a checkpoint as ``DetectionCheckpointer._load_file`` does.

    Raise a ReadError if it cannot be read, has another format, or NaN or infinite weights.
    """
    content, ignored = read_file(path), ()  # suffixes of names to drop
    if not isinstance(content, dict):
        content = {"model": None}
    elif path.endswith(".pkl") and not {"model", "__author__"} <= content.keys():
        content = {"model": content.get("blobs", content), "__author__": "Caffe2"}
        content["matching_heuristics"], ignored = True, "_momentum"
    elif path.endswith(".pyth"):
        content = {"model": content.get("model_state"), "__author__": "pycls"}
        content["matching_heuristics"], ignored = True, "num_batches_tracked"
    elif "model" not in content:
        content = {"model": content}

    weights = content["model"]
    if not isinstance(weights, dict) or not weights:
        raise ReadError(f"{path} has no dict of weights")
    for name, value in list(weights.items()):
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            weights[name] = value = torch.as_tensor(value)
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ReadError(
                f"{path} is not in a format of detectron2: {name!r} is a {type(value).__name__}, "
                "not a tensor; tools/convert_weights.py converts files of other libraries"
            )
        if not torch.isfinite(value).all():
            raise ReadError(f"{path} has NaN or infinite values in {name!r}")
        if name.endswith(ignored):
            del weights[name]
    return content


def read_file(path: str) -> Any:
    """Read a file of ``torch.save`` or, if its name ends in ``.pkl``, of ``pickle.dump``.

    Raise a ReadError if it is damaged, or has more than tensors, arrays and plain values.
    """
    trusted = os.environ.get(TRUST, "0").lower() in ("1", "y", "yes", "true")  # as in torch.load
    try:
        with open(path, "rb") as file:
            if not path.endswith(".pkl"):
                return _torch_load(file, trusted)
            return (pickle.Unpickler if trusted else _Unpickler)(file, encoding="latin1").load()
    except Exception as error:  # unpickling a damaged file can raise anything
        # torch raises its advice "from None"; the original error is the context.
        reason = error.__context__ if error.__suppress_context__ else error
        hint = HINT if isinstance(error, pickle.UnpicklingError) else ""
        reason = f"{type(reason).__name__}: {reason}".split("\n")[0]
        raise ReadError(f"{path} cannot be read as a checkpoint ({reason}){hint}") from error


def _torch_load(file: IO[bytes], trusted: bool = False) -> Any:
    if file.read(4) == b"PK\3\4":
        archive = zipfile.ZipFile(file)
        if damaged := archive.testzip():  # torch writes check sums, but does not verify them
            raise zipfile.BadZipFile(f"wrong check sum of {damaged}")
        if any(name.endswith("constants.pkl") for name in archive.namelist()):
            raise pickle.UnpicklingError("it is TorchScript")  # torch 2.4 would load it
    file.seek(0)
    # Also allow the functions and types that unpickle NumPy's arrays and scalars; torch 2.4 cannot.
    functions = [value.__reduce__()[0] for value in (np.zeros(0), np.float64(0))]
    dtypes = {type(np.dtype(kind)) for kind in np.sctypeDict.values()}
    safe_globals = getattr(torch.serialization, "safe_globals", nullcontext)
    with safe_globals([np.ndarray, np.dtype, *dtypes, *functions]):
        return torch.load(file, map_location="cpu", weights_only=not trusted)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: _torch_load(io.BytesIO(data))  # torch's own would run code
        if not SAFE_GLOBALS.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)
