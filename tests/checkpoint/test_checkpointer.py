"""AuditedCheckpointer: one read per load, resuming, and atomic saving."""

import os
import resource
import sys

import pytest
import torch
from torch import nn

from nl_detectron.checkpoint import AuditedCheckpointer, LoadError
from nl_detectron.files import SaveError
from nl_detectron.layers import NonLocalBlock

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}

opened_files = []
sys.addaudithook(lambda event, args: opened_files.append(args[0]) if event == "open" else None)


def test_file_is_opened_once(tmp_path):
    model, file = nn.Linear(3, 2), str(tmp_path / "a.pth")
    torch.save({"model": WEIGHTS}, file)
    opened_files.clear()
    AuditedCheckpointer(model, str(tmp_path)).resume_or_load(file)
    assert opened_files.count(file) == 1
    assert torch.equal(model.weight, WEIGHTS["weight"])


def test_files_that_are_not_there(tmp_path, monkeypatch):
    checkpointer = AuditedCheckpointer(nn.Linear(3, 2))
    with pytest.raises(LoadError, match=f"^there is no file {tmp_path}/a.pth$"):
        checkpointer.load(f"{tmp_path}/a.pth")
    monkeypatch.setattr(checkpointer.path_manager, "get_local_path", os.readlink, raising=False)
    with pytest.raises(LoadError, match=r"^https://a/b.pkl cannot be downloaded \(.*No such file"):
        checkpointer.load("https://a/b.pkl")


def make_run(folder, names=("model_0000001", "model_0000003")):
    """Save checkpoints of a model with an optimizer."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    checkpointer = AuditedCheckpointer(model, str(folder), optimizer=optimizer)
    for time, name in enumerate(names):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        checkpointer.save(name, iteration=int(name[-1]))
        os.utime(folder / f"{name}.pth", (time, time))
    return checkpointer


def test_resuming_restores_everything(tmp_path):
    saved = make_run(tmp_path)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    new = AuditedCheckpointer(model, str(tmp_path), optimizer=optimizer)
    assert new.resume_or_load("", resume=True) == {"iteration": 3}
    assert torch.equal(model.weight, saved.model.weight)
    assert optimizer.param_groups[0]["lr"] == 0.1
    expected = saved.checkpointables["optimizer"].state_dict()["state"]
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], expected[index]["momentum_buffer"])
    assert "optimizer" in new.resume_or_load(f"{tmp_path}/model_0000001.pth", resume=False)
    assert not torch.equal(model.weight, saved.model.weight)


def test_resuming_from_a_damaged_checkpoint(tmp_path):
    checkpointer = make_run(tmp_path)
    first, last = tmp_path / "model_0000001.pth", tmp_path / "model_0000003.pth"
    hint = f"; the latest complete checkpoint is {first}: to resume from it, write its name into .*"
    for damage, problem in (
        (lambda: os.truncate(last, 1000), f"{last} cannot be read as a checkpoint .*"),
        (last.unlink, f"there is no file {last}"),
    ):
        damage()
        with pytest.raises(LoadError, match=f"^{problem}{hint}"):
            checkpointer.resume_or_load("", resume=True)
    with pytest.raises(LoadError, match=f"^there is no file {last}$"):
        checkpointer.resume_or_load(str(last), resume=False)
    os.truncate(first, 1000)
    with pytest.raises(LoadError, match=f"^there is no file {last}$"):
        checkpointer.resume_or_load("", resume=True)


@pytest.mark.parametrize(
    "parts, error",
    [
        ({}, r"KeyError\('optimizer'\)"),
        ({"optimizer": {}}, r"KeyError\('param_groups'\)"),
        ({"optimizer": {"param_groups": [{}, {}], "state": {}}}, "ValueError"),
    ],
)
def test_checkpointables_that_do_not_fit(tmp_path, parts, error):
    """They are needed only for resuming."""
    model, file = nn.Linear(3, 2), f"{tmp_path}/a.pth"
    torch.save({"model": WEIGHTS, **parts}, file)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    checkpointer = AuditedCheckpointer(model, optimizer=optimizer)
    assert checkpointer.load("") == {}
    with pytest.raises(LoadError, match=f"^{file} .* 'optimizer' .*{error}.* SOLVER .*MODEL.WEIG"):
        checkpointer.load(file)
    AuditedCheckpointer(model, optimizer=optimizer).load(file, checkpointables=[])
    assert torch.equal(model.weight, WEIGHTS["weight"])


def test_blocks_of_a_later_version_are_refused(tmp_path):
    model = nn.Module()
    model.block = NonLocalBlock(4)
    state, file = model.state_dict(), str(tmp_path / "a.pth")
    torch.save({"model": state}, file)
    AuditedCheckpointer(model).load(file)
    state._metadata["block"] = {"version": 2}
    torch.save({"model": state}, file)
    with pytest.raises(LoadError, match=rf"^{file}: .*block .*\(version 2 "):
        AuditedCheckpointer(model).load(file)


def test_full_disk(tmp_path):
    """A limit to the size of a file stops a write in the middle, as a full disk does."""
    checkpointer, saved = make_run(tmp_path), sorted(os.listdir(tmp_path))
    checkpointer.model = nn.Linear(400, 400)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with pytest.raises(SaveError, match=r"5.pth cannot be written \(File too large\)$"):
            checkpointer.save("model_0000005")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert sorted(os.listdir(tmp_path)) == saved
