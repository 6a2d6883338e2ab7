"""Checkpoint files: all supported kinds of data are read, code is not run, damage is reported."""

import argparse
import io
import os
import pickle
from collections import OrderedDict
from contextlib import suppress

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


def dump_protocol_2(path, content):
    path.write_bytes(pickle.dumps(content["extra"], protocol=2))


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
        ("a.pth", dump_protocol_2),
        ("a.pkl", dump),
        ("a.pkl", dump_protocol_2),
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

    with suppress(EOFError, RuntimeError):  # the file contains nothing but the code
        if name.endswith(".pkl"):
            pickle.loads(file.read_bytes())
        else:
            torch.load(file, weights_only=False)
    assert folder.exists()  # plain loading runs the code


@pytest.mark.parametrize("name, write", [("a.pth", save), ("a.pkl", dump)])
def test_trusted_file(tmp_path, monkeypatch, name, write):
    content = {"model": dict(WEIGHTS), "__author__": "x", "args": argparse.Namespace(depth=50)}
    write(tmp_path / name, content)
    with pytest.raises(ReadError, match=r"argparse\.Namespace"):
        read_checkpoint(str(tmp_path / name))
    monkeypatch.setenv(TRUST, "1")
    assert read_checkpoint(str(tmp_path / name))["args"] == argparse.Namespace(depth=50)


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="needs torch 2.5")
@pytest.mark.parametrize("name, write", [("a.pth", save), ("a.pth", save_legacy), ("a.pkl", dump)])
def test_plain_data_is_read(tmp_path, name, write):
    arrays = {"array": np.eye(3, order="F"), "parameter": nn.Parameter(-WEIGHTS["bias"])}
    content = {
        "model": OrderedDict(WEIGHTS | arrays),
        "__author__": "somebody",
        "iteration": np.int64(7),
        "values": [np.float32(0.5), True, None, "text", b"bytes", (1, 2.5), {3}],
        "random": np.random.RandomState(1).get_state(),
        "rng": torch.get_rng_state(),
    }
    write(tmp_path / name, content)
    read = read_checkpoint(str(tmp_path / name))
    assert set(read) == set(content)
    for key, value in content["model"].items():
        assert torch.equal(read["model"][key], torch.as_tensor(value)), key
    assert read["iteration"] == 7 and read["values"] == content["values"]
    assert np.array_equal(read["random"][1], content["random"][1])
    assert torch.equal(read["rng"], content["rng"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_protocols(tmp_path, protocol):
    core = np.zeros(0).__reduce__()[0].__module__.removesuffix("multiarray").encode()
    content = pickle.dumps({"w": np.arange(6.0).reshape(2, 3)}, protocol=protocol)
    assert core in content
    versions = [content]
    if protocol < 4:  # later protocols store lengths
        versions.append(content.replace(core, b"numpy.core."))
    for data in versions:
        (tmp_path / "a.pkl").write_bytes(data)
        weights = read_checkpoint(str(tmp_path / "a.pkl"))["model"]
        assert torch.equal(weights["w"], torch.arange(6.0, dtype=torch.float64).view(2, 3))


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
    "missing.pth": (lambda path: None, f"{UNREADABLE}FileNotFoundError"),
    "empty.pth": (lambda path: path.write_bytes(b""), f"{UNREADABLE}EOFError"),
    "text.pth": (lambda path: path.write_text("hello"), UNREADABLE),
    "image.pkl": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), UNREADABLE),
    "truncated.pth": (truncated, UNREADABLE),
    "flipped.pth": (flipped_bit, f"{UNREADABLE}BadZipFile: wrong check sum of .*data"),
    "script.pth": (torchscript, f"{UNREADABLE}UnpicklingError: it is TorchScript"),
    "class.pth": (lambda path: save(path, nn.Linear(3, 2)), ".*torch.nn.modules.linear.Linear"),
    "list.pkl": (lambda path: dump(path, [1]), "has no dict of weights"),
    "no_weights.pth": (lambda path: save(path, {"model": {}}), "has no dict of weights"),
    "other.pyth": (lambda path: save(path, {"model": WEIGHTS}), "has no dict of weights"),
    "keys.pkl": (lambda path: dump(path, {1: np.ones(1)}), "is not in a format of detectron2: 1 "),
    "strings.pkl": (lambda path: dump(path, {"w": np.array(["a"])}), "is not in a format .*'w'"),
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
