"""The trainer against DefaultTrainer, stopping in the last step, and metrics.json."""

import json
import os
import signal

import pytest
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from nl_detectron.checkpoint import AuditedCheckpointer
from nl_detectron.engine import Trainer
from nl_detectron.engine.trainer import truncate_metrics
from nl_detectron.errors import UserError


@pytest.mark.parametrize("amp", [False, True])
def test_has_what_default_trainer_has(tiny_config, amp):
    """Also the same parts in its checkpoints, in each version of detectron2."""
    ours, default = (
        kind(tiny_config("SOLVER.AMP.ENABLED", amp)) for kind in (Trainer, DefaultTrainer)
    )
    assert type(ours._trainer) is type(default._trainer)
    assert vars(default).keys() - vars(ours).keys() == set()
    assert vars(default._trainer).keys() == vars(ours._trainer).keys()
    assert isinstance(ours.checkpointer, AuditedCheckpointer)
    parts, expected = ours.checkpointer.checkpointables, default.checkpointer.checkpointables
    assert parts.keys() == expected.keys()
    for name in parts:
        assert parts[name].state_dict().keys() == expected[name].state_dict().keys()
    expected = [type(hook) for hook in default._hooks]
    assert [type(hook) for hook in ours._hooks if type(hook) in expected] == expected


def test_batch_and_schedule_are_scaled(tiny_config):
    scaled = Trainer(tiny_config("SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.MAX_ITER", 10))
    assert scaled.cfg.SOLVER.IMS_PER_BATCH == 1
    assert scaled.max_iter == scaled.cfg.SOLVER.MAX_ITER == 20


def test_processes_that_found_different_checkpoints(tiny_config, monkeypatch):
    trainer = Trainer(tiny_config())
    monkeypatch.setattr(comm, "all_gather", lambda iteration: [iteration, 5])
    with pytest.raises(UserError, match=r"iterations \[0, 5\]; OUTPUT_DIR .* all machines share"):
        trainer.resume_or_load()


def evaluations(folder):
    lines = (folder / "metrics.json").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "bbox/AP" in line]


def test_stopped_in_the_last_step(tiny_config, tmp_path):
    """The weights are final. The evaluation, which may take long, is left to --resume."""
    handler = signal.getsignal(signal.SIGTERM)
    stopped = Trainer(tiny_config("SOLVER.MAX_ITER", 1))
    run_step = stopped.run_step
    stopped.run_step = lambda: (os.kill(os.getpid(), signal.SIGTERM), run_step())
    with pytest.raises(SystemExit) as exit_info:
        stopped.train()
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # Ctrl-C would end it at once
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert sorted(file.name for file in tmp_path.glob("*.pth")) == ["model_final.pth"]
    assert evaluations(tmp_path) == []

    resumed = Trainer(tiny_config("SOLVER.MAX_ITER", 1))
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert len(evaluations(tmp_path)) == 1
    assert signal.getsignal(signal.SIGTERM) == handler


def test_truncate_metrics(tmp_path):
    path = tmp_path / "metrics.json"
    truncate_metrics(path, 0)
    assert not path.exists()
    lines = ['{"iteration": 19}\n', '{"iteration": 39}\n', '{"itera']
    path.write_text(lines[0])
    truncate_metrics(path, 30)
    assert path.read_text() == lines[0] and len(list(tmp_path.iterdir())) == 1
    path.write_text("".join(lines))
    with open(path, "a") as writer:  # as a run that has opened it already
        truncate_metrics(path, 30)
        writer.write('{"iteration": 30}\n')
    assert path.read_text() == lines[0] + '{"iteration": 30}\n'
    assert path.with_name("metrics.json.bak").read_text() == "".join(lines)
