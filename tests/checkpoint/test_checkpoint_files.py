"""Files of weights: strangers' that would run code, damaged ones, and those being written."""

import argparse
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nl_detectron.checkpoint import AuditedCheckpointer, LoadError, SaveError, read_checkpoint
from nl_detectron.engine import argument_parser, main
from nl_detectron.layers import NonLocalBlock

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = str(REPOSITORY / "tests" / "mask_rcnn_tiny.yaml")
TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


@pytest.fixture(autouse=True)
def trust_nobody(monkeypatch):
    monkeypatch.delenv(TRUST, raising=False)


def save(path, content):
    torch.save(content, path)


def save_legacy(path, content):
    """As torch did before 1.6."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


def dump(path, content):
    path.write_bytes(pickle.dumps(content))


def dump_bare(path, content):
    """No file of torch at all, whatever its name."""
    path.write_bytes(pickle.dumps(content["extra"], protocol=2))


def dump_tensors_as_bytes(path, content):
    """A tensor in a pickle has its values in a file of torch, which can hide something too."""

    class Tensor:
        def __reduce__(self):
            buffer = io.BytesIO()
            torch.save(content, buffer)
            return torch.storage._load_from_bytes, (buffer.getvalue(),)

    dump(path, {"model": Tensor(), "__author__": "somebody"})


class TouchesFile:
    """What is pickled so is called when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


CODE = [
    ("a.pth", save),
    ("a.pth", save_legacy),
    ("a.pth", dump_bare),
    ("a.pkl", dump),
    ("a.pkl", dump_bare),
    ("a.pkl", dump_tensors_as_bytes),
    ("a.pyth", save),
]


@pytest.mark.parametrize("name, write", CODE)
def test_code_is_not_run(tmp_path, name, write):
    file, made = tmp_path / name, tmp_path / "made"
    write(file, {"model": WEIGHTS, "extra": TouchesFile(made)})
    model = nn.Linear(3, 2)
    for load in (read_checkpoint, AuditedCheckpointer(model).load):
        with pytest.raises(LoadError) as error:
            load(str(file))
        message = str(error.value)
        assert message.startswith(f"{file} is refused, since loading it may run code: ")
        assert f"it asks for {os.mkdir.__module__}.mkdir," in message and f"{TRUST}=1" in message
        assert not made.exists()

    with suppress(EOFError, RuntimeError):  # where nothing but the code is in the file
        if name.endswith(".pkl"):
            pickle.loads(file.read_bytes())
        else:
            torch.load(file, weights_only=False)
    assert made.exists()  # it is code


def test_a_class_is_refused_too(tmp_path):
    torch.save(nn.Linear(3, 2), tmp_path / "a.pth")
    with pytest.raises(LoadError, match=r"it asks for torch\.nn\.modules\.linear\.Linear,"):
        read_checkpoint(str(tmp_path / "a.pth"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about the variable
@pytest.mark.parametrize("name, write", [("a.pth", save), ("a.pkl", dump)])
def test_a_trusted_file(tmp_path, monkeypatch, name, write):
    file, model = str(tmp_path / name), nn.Linear(3, 2)
    content = {"model": WEIGHTS, "__author__": "x", "args": argparse.Namespace(depth=50)}
    write(tmp_path / name, content)
    with pytest.raises(LoadError, match="it asks for argparse.Namespace,"):
        AuditedCheckpointer(model).load(file)
    monkeypatch.setenv(TRUST, "1")
    assert AuditedCheckpointer(model).load(file)["args"] == argparse.Namespace(depth=50)
    assert equal(model.weight, WEIGHTS["weight"])


def equal(a, b):
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@pytest.mark.parametrize(
    "name, write", [("a.pth", save), ("a.pth", save_legacy), ("a.pkl", dump), ("b.pkl", dump)]
)
def test_data_of_every_kind_is_read(tmp_path, name, write):
    content = {
        "model": OrderedDict(WEIGHTS) if name != "b.pkl" else {"w": np.eye(3, order="F")},
        "__author__": "somebody",
        "iteration": np.int64(7),
        "values": [np.float32(0.5), True, None, "text", b"bytes", (1, 2.5), {3}],
        "random": np.random.RandomState(1).get_state(),
        "rng": torch.get_rng_state(),
    }
    write(tmp_path / name, content)
    read = read_checkpoint(str(tmp_path / name))
    assert set(read) == set(content)
    assert all(equal(read["model"][key], value) for key, value in content["model"].items())
    assert read["iteration"] == 7 and read["values"] == content["values"]
    assert np.array_equal(read["random"][1], content["random"][1])
    assert equal(read["rng"], content["rng"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_age(tmp_path, protocol):
    content = pickle.dumps({"w": np.arange(6.0).reshape(2, 3)}, protocol=protocol)
    assert b"numpy._core" in content
    for data in (content, content.replace(b"numpy._core.", b"numpy.core.")):
        if len(data) == len(content) or protocol < 4:  # newer ones count their bytes
            (tmp_path / "a.pkl").write_bytes(data)
            assert equal(
                read_checkpoint(str(tmp_path / "a.pkl"))["w"], np.arange(6.0).reshape(2, 3)
            )


# Damaged and foreign files.


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


def nan(path):
    save(path, {"model": {**WEIGHTS, "conv.weight": torch.tensor([1, float("nan")])}})


def infinite(path):
    values = {"conv.weight": np.array([1, -np.inf]), "conv.bias": np.array([np.nan])}
    dump(path, {"blobs": values})


def of_mmdet(path):
    save(path, {"meta": {"epoch": 12}, "state_dict": WEIGHTS})


BAD = {
    "empty.pth": (lambda path: path.write_bytes(b""), "cannot be read as a checkpoint (EOFError"),
    "text.pth": (lambda path: path.write_text("hello"), "cannot be read as a checkpoint ("),
    "image.pth": (
        lambda path: path.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(99)),
        "cannot be read as a checkpoint (",
    ),
    "image.pkl": (
        lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)),
        "cannot be read as a checkpoint (",
    ),
    "truncated.pth": (truncated, "cannot be read as a checkpoint ("),
    "flipped.pth": (flipped_bit, "cannot be read as a checkpoint (ValueError: the check sum of"),
    "script.pth": (torchscript, "cannot be read as a checkpoint (RuntimeError: Cannot use"),
    "list.pkl": (lambda path: dump(path, [1]), "holds no weights, but an object of type list"),
    "nothing.pth": (lambda path: save(path, {}), "holds no weights"),
    "hollow.pth": (lambda path: save(path, {"model": {}}), "holds no weights under 'model'"),
    "mmdet.pth": (of_mmdet, "is not in a format of detectron2: 'meta' in it is of type dict"),
    "nan.pth": (nan, "has values that are NaN or infinite in 'conv.weight'"),
    "inf.pkl": (infinite, "has values that are NaN or infinite in 'conv.weight' and 1 more"),
    "code.pkl": (lambda path: dump(path, TouchesFile(path / "x")), "is refused, since loading it"),
}


def message_of(capsys, *arguments):
    """What train_net.py's main, in this process, says before it exits with status 2."""
    data = ["DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "()"]
    with pytest.raises(SystemExit) as exit_info:
        main(
            argument_parser().parse_args(
                ["--config-file", TINY, *arguments[:-2], *data, *arguments[-2:]]
            )
        )
    assert exit_info.value.code == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return message.removeprefix("error: ")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", BAD)
def test_bad_weights(datasets, tmp_path, capsys, name):
    write, message = BAD[name]
    file = tmp_path / name
    write(file)
    said = message_of(capsys, "MODEL.WEIGHTS", str(file))
    assert said.startswith(f"MODEL.WEIGHTS: {file} {message}")


# One training, killed and resumed. A driver is train_net.py with one thing changed.

KILLED = """
import io, os, signal, sys, torch
save = torch.save
def save_half(data, file):
    if "0000003" not in file.name:
        return save(data, file)
    whole = io.BytesIO()
    save(data, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_half
"""
FULL = """
import resource, signal
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""


def train(datasets, folder, *options, driver=""):
    command = driver + "from nl_detectron.engine import argument_parser, main\n"
    command += "main(argument_parser().parse_args())"
    arguments = ["--config-file", TINY, *options, "DATASETS.TEST", "()", "OUTPUT_DIR", "out"]
    return subprocess.run(
        [sys.executable, "-c", command, *arguments],
        cwd=folder,
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def half_trained(datasets, tmp_path_factory):
    """The folder of a run of 2 of 4 iterations."""
    folder = tmp_path_factory.mktemp("half_trained")
    run = train(datasets, folder, "SOLVER.MAX_ITER", "2")
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in (folder / "out").glob("*.pth*")) == [
        "model_0000001.pth",
        "model_final.pth",
    ]
    (folder / "out" / "model_final.pth").unlink()
    (folder / "out" / "last_checkpoint").write_text("model_0000001.pth")
    return folder


@pytest.fixture
def run_folder(half_trained, tmp_path):
    shutil.copytree(half_trained / "out", tmp_path / "out")
    return tmp_path


def test_killed_while_a_checkpoint_is_written(datasets, run_folder):
    out = run_folder / "out"
    killed = train(datasets, run_folder, "--resume", driver=KILLED)
    assert killed.returncode == -signal.SIGKILL
    files = sorted(path.name for path in out.glob("*.pth*"))
    assert files == ["model_0000001.pth", "model_0000003.pth.partial"]
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"

    resumed = train(datasets, run_folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "Starting training from iteration 2" in resumed.stdout
    files = sorted(path.name for path in out.glob("*.pth*"))
    assert files == ["model_0000001.pth", "model_0000003.pth", "model_final.pth"]
    assert (out / "last_checkpoint").read_text() == "model_final.pth"


def test_disk_full(datasets, run_folder):
    """By a limit to the size of a file, which stops a write in the middle in the same way."""
    out = run_folder / "out"
    before = (out / "model_0000001.pth").read_bytes()
    assert len(before) > 200_000
    run = train(datasets, run_folder, "--resume", driver=FULL)
    assert run.returncode == 2
    (message,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert message == (
        "error: out/model_0000003.pth could not be written (File too large); "
        "--resume goes on from out/model_0000001.pth"
    )
    assert [path.name for path in out.glob("*.pth*")] == ["model_0000001.pth"]
    assert (out / "model_0000001.pth").read_bytes() == before
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"


def test_resuming_from_a_damaged_checkpoint(datasets, run_folder, capsys):
    out = run_folder / "out"
    last = out / "model_0000003.pth"
    shutil.copy(out / "model_0000001.pth", last)
    (out / "last_checkpoint").write_text(last.name)
    way = f"to go on from it, write its name, model_0000001.pth, into {out}/last_checkpoint"
    for damage in (lambda: os.truncate(last, 1000), last.unlink):
        damage()
        said = message_of(capsys, "--resume", "OUTPUT_DIR", str(out))
        assert re.match(f"--resume: (no file )?{last}", said)
        assert said.endswith(f"; the last one that is whole is {out}/model_0000001.pth: {way}")
    os.truncate(out / "model_0000001.pth", 1000)
    said = message_of(capsys, "--resume", "OUTPUT_DIR", str(out))
    assert said.endswith("; there is no whole one beside it")


# The checkpointer by itself.


def test_full_file_system(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        AuditedCheckpointer(nn.Linear(9, 9), str(folder)).save("small")
        with pytest.raises(SaveError, match="/big.pth could not be written .No space left on dev"):
            AuditedCheckpointer(nn.Linear(400, 400), str(folder)).save("big")
        assert sorted(os.listdir(folder)) == ["last_checkpoint", "small.pth"]
        assert (folder / "last_checkpoint").read_text() == "small.pth"
        read_checkpoint(str(folder / "small.pth"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_checkpoint_that_is_replaced_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    checkpointer = AuditedCheckpointer(nn.Linear(3, 2), str(tmp_path))
    checkpointer.save("model_final", iteration=1)
    before = (tmp_path / "model_final.pth").read_bytes()

    def interrupted(data, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_final", iteration=2)
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_final.pth"]


def test_what_is_saved_is_what_detectron2_saves(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folders = [tmp_path / "ours", tmp_path / "detectron2s"]
    for folder, kind in zip(folders, AuditedCheckpointer.__mro__):
        folder.mkdir()
        kind(model, str(folder), optimizer=optimizer).save("a", iteration=3)
        assert (folder / "last_checkpoint").read_text() == "a.pth"
    assert folders[0].joinpath("a.pth").read_bytes() == folders[1].joinpath("a.pth").read_bytes()


def test_first_save_that_fails(tmp_path):
    checkpointer = AuditedCheckpointer(nn.Linear(3, 2), str(tmp_path / "nowhere"))
    with pytest.raises(
        SaveError, match=r"\(No such file or directory\); there is no checkpoint yet$"
    ):
        checkpointer.save("a")


def test_optimizer_of_other_parameters(tmp_path):
    model = nn.Linear(3, 2)
    both = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], 0.1)
    AuditedCheckpointer(model, str(tmp_path), optimizer=both).save("a")
    other = AuditedCheckpointer(model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(LoadError, match=f"^{tmp_path}/a.pth does not fit .* SOLVER .* groups"):
        other.load(f"{tmp_path}/a.pth")


@pytest.mark.parametrize("parts, key", [({}, "optimizer"), ({"optimizer": {}}, "param_groups")])
def test_a_part_that_another_version_did_not_write(tmp_path, parts, key):
    """It is missed only where a training goes on."""
    model, file = nn.Linear(3, 2), f"{tmp_path}/a.pth"
    torch.save({"model": WEIGHTS, **parts}, file)

    def load(**options):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        AuditedCheckpointer(model, optimizer=optimizer).load(file, **options)

    with pytest.raises(LoadError, match=f"^{file} has no '{key}', .* As MODEL.WEIGHTS of a new"):
        load()
    load(checkpointables=[])
    assert equal(model.weight, WEIGHTS["weight"])


# The version of a block's names.


def test_names_of_a_later_version_are_refused(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = NonLocalBlock(4)

    model = Model()
    state = model.state_dict()
    assert state._metadata["block"] == {"version": 1}
    file = tmp_path / "a.pth"
    for version, later in ((1, False), (None, False), (2, True)):
        state._metadata["block"] = {} if version is None else {"version": version}
        torch.save({"model": state}, file)
        if later:
            with pytest.raises(LoadError, match=f"^{file}: .*block was saved by a later nl_detect"):
                AuditedCheckpointer(model).load(str(file))
        else:
            AuditedCheckpointer(model).load(str(file))
