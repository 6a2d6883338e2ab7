"""SOLVER.OPTIMIZER: the settings of AdamW, and its exact resuming."""

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from nl_detectron.engine import Trainer
from nl_detectron.errors import OptionError
from nl_detectron.modeling import build_model, build_optimizer

OPTIONS = """SOLVER.BASE_LR 0.001 SOLVER.WEIGHT_DECAY_NORM 0.2 SOLVER.NONLOCAL_LR_FACTOR 10.0
    SOLVER.WEIGHT_DECAY_NONLOCAL 0.3 SOLVER.CLIP_GRADIENTS.ENABLED True""".split()


def test_adamw_has_the_settings_of_sgd(tiny_config):
    model = build_model(tiny_config())
    settings = {}
    for kind in ("SGD", "ADAMW"):
        optimizer = build_optimizer(tiny_config(*OPTIONS, "SOLVER.OPTIMIZER", kind), model)
        groups = [(g["lr"], g["weight_decay"], g["params"]) for g in optimizer.param_groups]
        settings[kind] = {p: (lr, decay) for lr, decay, params in groups for p in params}
    assert type(optimizer).__name__ == "AdamWWithGradientClip"
    assert settings["ADAMW"] == settings["SGD"]
    assert set(settings["SGD"].values()) == {(0.001, 1e-4), (0.001, 0.2), (0.01, 0.3)}
    with pytest.raises(OptionError, match="^SOLVER.OPTIMIZER 'Adam' is unknown; valid: 'SGD', 'AD"):
        build_optimizer(tiny_config("SOLVER.OPTIMIZER", "Adam"), model)


def test_exact_resume(tiny_config, tmp_path):
    def train(folder, iterations):
        (tmp_path / folder).mkdir(exist_ok=True)
        options = ["OUTPUT_DIR", str(tmp_path / folder), "SOLVER.MAX_ITER", iterations]
        options += ["SOLVER.OPTIMIZER", "ADAMW", "SOLVER.WARMUP_ITERS", 0, "DATASETS.TEST", ()]
        seed_all_rng(1)
        trainer = Trainer(tiny_config(*OPTIONS, *options))
        trainer.resume_or_load(resume=True)
        trainer.train()
        momenta = [state["exp_avg_sq"] for state in trainer.optimizer.state.values()]
        return [*trainer.model.state_dict().values(), *momenta]

    train("parts", 2)
    assert all(map(torch.equal, train("parts", 4), train("whole", 4)))
