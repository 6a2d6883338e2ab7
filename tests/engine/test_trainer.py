"""The trainer against DefaultTrainer, its files, and how it stops."""

import os
import re
import signal

import pytest
import torch
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from torch.nn.utils import parameters_to_vector

from nl_detectron.checkpoint import AuditedCheckpointer
from nl_detectron.engine import Trainer
from nl_detectron.engine.trainer import truncate_metrics
from nl_detectron.errors import UserError

PARAMETER = "backbone.bottom_up.res4.nonlocal4.g.weight"


@pytest.mark.parametrize("amp", [False, True])
def test_has_what_default_trainer_has(tiny_config, amp):
    """Also the same parts in its checkpoints, in each version of detectron2."""
    cfg = tiny_config("SOLVER.AMP.ENABLED", amp)
    ours, default = Trainer(cfg), DefaultTrainer(cfg)
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


def test_processes_that_found_different_checkpoints(tiny_config, monkeypatch):
    trainer = Trainer(tiny_config())
    monkeypatch.setattr(comm, "all_gather", lambda iteration: [iteration, 5])
    with pytest.raises(UserError, match=r"iterations \[0, 5\]; OUTPUT_DIR .* all machines share"):
        trainer.resume_or_load()


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
    assert [file.name for file in tmp_path.glob("*.pth")] == ["model_final.pth"]
    assert "bbox/AP" not in (tmp_path / "metrics.json").read_text()

    resumed = Trainer(tiny_config("SOLVER.MAX_ITER", 1))
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert "bbox/AP" in (tmp_path / "metrics.json").read_text()
    assert signal.getsignal(signal.SIGTERM) == handler


def test_truncate_metrics(tmp_path):
    path = tmp_path / "metrics.json"
    truncate_metrics(path, 0)  # as when a training starts
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


def state(trainer):
    """Return a copy of the parameters and of the optimizer's momenta."""
    parameters = list(trainer.model.parameters())
    momenta = [trainer.optimizer.state[p]["momentum_buffer"] for p in parameters]
    return parameters_to_vector([*parameters, *momenta]).detach()


def break_loss(trainer):
    predictor = trainer.model.roi_heads.box_predictor
    losses = predictor.losses
    predictor.losses = lambda *args: {name: loss / 0 for name, loss in losses(*args).items()}


def break_gradient(trainer):
    # One element only: clipping by norm spreads it to all others, clipping by value does not.
    parameter = trainer.model.get_parameter(PARAMETER)
    bad = torch.zeros_like(parameter)
    bad.view(-1)[3] = float("nan")
    parameter.register_hook(lambda gradient: gradient + bad)


LOSS = "Loss became infinite or NaN at iteration=1! .*loss_cls"
GRADIENT = rf"the gradient of {re.escape(PARAMETER)} is not finite"


@pytest.mark.parametrize(
    "break_step, clip, message",
    [
        (break_loss, [], LOSS),
        (break_gradient, [], GRADIENT),
        (break_gradient, ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"], GRADIENT),
        (break_gradient, ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"], GRADIENT),
    ],
)
def test_a_value_that_is_not_finite(tiny_config, tmp_path, break_step, clip, message):
    """Training stops without that step, its checkpoint, or an evaluation."""
    options = ["SOLVER.CLIP_GRADIENTS.ENABLED", bool(clip), *clip]
    trainer = Trainer(tiny_config("SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, *options))
    run_step, before = trainer.run_step, []

    def break_second_step():
        if trainer.iter == 1:
            before.append(state(trainer))
            break_step(trainer)
        run_step()

    trainer.run_step = break_second_step
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert re.match(f"iteration 1: {message}", str(error.value)), error.value
    files = re.search(r"Images of the batch: (.*?)\. The step", str(error.value))[1].split(", ")
    assert len(files) == 2 and all(map(os.path.isfile, files))
    assert torch.equal(*before, state(trainer))
    assert [file.name for file in tmp_path.glob("*.pth")] == ["model_0000000.pth"]
    assert "bbox/AP" not in (tmp_path / "metrics.json").read_text()
