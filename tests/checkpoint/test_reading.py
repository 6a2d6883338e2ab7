"""Checkpoint files: all supported kinds of data are read, code is not run, damage is reported."""

import argparse
import io
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from nl_detectron.checkpoint.reading import TRUST, ReadError, read_checkpoint

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


@pytest.fixture(autouse=True)
def untrusted(monkeypatch):
    monkeypatch.delenv(TRUST, raising=False)


def save(path, content):
    torch.save(content, path)


def save_legacy(path, content):
    """Save in the format of torch before 1.6."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


def dump(path, content):
    path.write_bytes(pickle.dumps(content))


class NestedTensor:
    """The storage of a pickled tensor is a file of torch.save, which can contain code too."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        buffer = io.BytesIO()
        torch.save(self.content, buffer)
        return torch.storage._load_from_bytes, (buffer.getvalue(),)


def dump_nested(path, content):
    dump(path, {"model": NestedTensor(content), "__author__": "somebody"})


class CreatesFolder:
    """Unpickling this calls os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name, write",
    [
        ("a.pth", save),
        ("a.pth", save_legacy),
        ("a.pkl", dump),
        ("a.pkl", dump_nested),
        ("a.pyth", save),
    ],
)
def test_code_is_not_run(tmp_path, name, write):
    file, folder = tmp_path / name, tmp_path / "folder"
    write(file, {"model": WEIGHTS, "extra": CreatesFolder(folder)})
    with pytest.raises(ReadError) as error:
        read_checkpoint(str(file))
    message = str(error.value)
    assert message.startswith(f"{file} cannot be read as a checkpoint (")
    assert f"{os.mkdir.__module__}.mkdir" in message and f"{TRUST}=1" in message
    assert "\n" not in message and not folder.exists()

    if name.endswith(".pkl"):
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert folder.exists()  # plain loading runs the code


@pytest.mark.parametrize("name, write", [("a.pth", save), ("a.pkl", dump)])
def test_trusted_file(tmp_path, monkeypatch, name, write):
    content = {"model": dict(WEIGHTS), "__author__": "x", "args": argparse.Namespace(depth=50)}
    write(tmp_path / name, content)
    monkeypatch.setenv(TRUST, "1")
    assert read_checkpoint(str(tmp_path / name))["args"] == argparse.Namespace(depth=50)


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="needs torch 2.5")
@pytest.mark.parametrize("name, write", [("a.pth", save), ("a.pth", save_legacy), ("a.pkl", dump)])
def test_plain_data_is_read(tmp_path, name, write):
    arrays = {"array": np.eye(3, order="F"), "parameter": nn.Parameter(-WEIGHTS["bias"])}
    values = [np.float32(0.5), np.int64(7), True, None, "text", b"bytes", (1, 2.5), {3}]
    content = {"model": OrderedDict(WEIGHTS | arrays), "__author__": "somebody", "values": values}
    content["random"] = np.random.RandomState(1).get_state()
    write(tmp_path / name, content)
    read = read_checkpoint(str(tmp_path / name))
    assert set(read) == set(content)
    for key, value in content["model"].items():
        assert torch.equal(read["model"][key], torch.as_tensor(value)), key
    assert read["values"] == values
    assert np.array_equal(read["random"][1], content["random"][1])


@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
def test_arrays_of_both_numpy_versions(tmp_path, core):
    content = pickle.dumps({"w": np.arange(6.0)}, protocol=2)
    written = np.zeros(0).__reduce__()[0].__module__.removesuffix("multiarray").encode()
    (tmp_path / "a.pkl").write_bytes(content.replace(written, core))
    assert read_checkpoint(str(tmp_path / "a.pkl"))["model"]["w"].tolist() == [0, 1, 2, 3, 4, 5]


TRACKED = {"bn.num_batches_tracked": torch.ones(1)}


@pytest.mark.parametrize(
    "name, content, author, names",
    [
        ("a.pth", {"model": WEIGHTS}, None, ["weight", "bias"]),
        ("a.pth", WEIGHTS, None, ["weight", "bias"]),
        ("a.pkl", {"model": WEIGHTS, "__author__": "zoo"}, "zoo", ["weight", "bias"]),
        ("a.pkl", {"blobs": WEIGHTS, "cfg": ""}, "Caffe2", ["weight", "bias"]),
        ("a.pkl", {"w": np.ones(1), "w_momentum": np.ones(1)}, "Caffe2", ["w"]),
        ("a.pyth", {"model_state": {**WEIGHTS, **TRACKED}}, "pycls", ["weight", "bias"]),
    ],
)
def test_formats_of_detectron2(tmp_path, name, content, author, names):
    (dump if name.endswith(".pkl") else save)(tmp_path / name, content)
    read = read_checkpoint(str(tmp_path / name))
    assert read.get("__author__") == author and list(read["model"]) == names
    assert read.get("matching_heuristics", False) == (author in ("Caffe2", "pycls"))


def truncated(path):
    save(path, {"model": WEIGHTS})
    os.truncate(path, path.stat().st_size // 2)


def flipped_bit(path):
    save(path, {"model": WEIGHTS})
    data = bytearray(path.read_bytes())
    data[data.find(WEIGHTS["weight"].numpy().tobytes()) + 9] ^= 1
    path.write_bytes(data)


def torchscript(path):
    torch.jit.trace(nn.Linear(3, 2), torch.ones(3)).save(str(path))


UNREADABLE = "cannot be read as a checkpoint \\("
NAN = {"conv.weight": torch.tensor([1, float("nan")])}
INFINITE = {"conv.weight": np.array([1, -np.inf])}
NOT_FINITE = "has NaN or infinite values in 'conv.weight'$"
BAD = {
    "empty.pth": (lambda path: path.write_bytes(b""), f"{UNREADABLE}EOFError"),
    "truncated.pth": (truncated, UNREADABLE),
    "flipped.pth": (flipped_bit, f"{UNREADABLE}BadZipFile: wrong check sum of .*data"),
    "script.pth": (torchscript, f"{UNREADABLE}UnpicklingError: it is TorchScript"),
    "class.pth": (lambda path: save(path, nn.Linear(3, 2)), ".*torch.nn.modules.linear.Linear"),
    "no_weights.pth": (lambda path: save(path, {"model": {}}), "has no dict of weights"),
    "keys.pkl": (lambda path: dump(path, {1: np.ones(1)}), "is not in a format of detectron2: 1 "),
    "mmdet.pth": (
        lambda path: save(path, {"meta": {"epoch": 12}, "state_dict": WEIGHTS}),
        "is not in a format of detectron2: 'meta' is a dict, not a tensor; tools/convert_weights",
    ),
    "nan.pth": (lambda path: save(path, {"model": {**WEIGHTS, **NAN}}), NOT_FINITE),
    "infinite.pkl": (lambda path: dump(path, {"blobs": INFINITE}), NOT_FINITE),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    write, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(ReadError, match=f"^{tmp_path / name} {message}") as error:
        read_checkpoint(str(tmp_path / name))
    assert "\n" not in str(error.value)
