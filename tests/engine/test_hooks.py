"""What NonLocalNorms logs of each block."""

import logging
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from nl_detectron.engine.hooks import NonLocalNorms
from nl_detectron.layers import GlobalContextBlock, NonLocalBlock, affinity


@pytest.mark.parametrize("amp", [False, True])
def test_values_of_the_last_step(amp, caplog):
    torch.manual_seed(0)
    # Two positions, which are the queries in any order.
    model, x = nn.Sequential(NonLocalBlock(16), GlobalContextBlock(16)), torch.randn(3, 16, 1, 2)
    nn.init.normal_(model[0].out.weight)
    hook = NonLocalNorms(model)
    with EventStorage() as storage, caplog.at_level(logging.WARNING, "nl_detectron"):
        hook.trainer = SimpleNamespace(storage=storage, max_iter=3)
        for hook.trainer.iter in range(3):
            model.zero_grad()
            hook.before_step()
            with torch.autocast("cpu", enabled=amp):
                z = model[0](x)
                model[1](z).sum().backward()
            hook.after_step()
            assert bool(storage.latest()) == (hook.trainer.iter == 2)
        hook.trainer.iter = 3
        hook.after_train()
        values = {key: value for key, (value, _) in storage.latest().items()}

    gradients = torch.cat([p.grad.flatten() for p in model[0].parameters()])
    expected = {
        "change": (z - x).norm() / x.norm(),
        "query_difference": affinity.query_difference(model[0].affinity_matrix(x)),
        "grad_norm": gradients.norm(),
        "out_norm": model[0].out.weight.norm(),
    }
    for key, value in expected.items():
        assert values.pop(f"nonlocal/0/{key}") == pytest.approx(value.item(), rel=0.02)
    assert values.keys() == {f"nonlocal/1/{key}" for key in ("change", "grad_norm", "out_norm")}
    assert values["nonlocal/1/change"] == values["nonlocal/1/out_norm"] == 0
    assert "1 is still near the identity: it changes its input by 0.00% (L2" in caplog.text
    assert caplog.text.count("near the identity") == 1
