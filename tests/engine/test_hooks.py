"""What NonLocalMetrics logs of each block."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from nl_detectron.engine.hooks import NonLocalMetrics
from nl_detectron.layers import GlobalContextBlock, NonLocalBlock, affinity


@pytest.mark.parametrize("amp", [False, True])
def test_values_of_the_last_step(amp, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(NonLocalBlock(16, subsample="none"), GlobalContextBlock(16))
    nn.init.normal_(model[0].out.weight)
    x = torch.randn(3, 16, 1, 3)  # three positions, all of which are queries
    hook = NonLocalMetrics(model)
    with EventStorage() as storage, caplog.at_level("WARNING", "nl_detectron"):
        hook.trainer = SimpleNamespace(storage=storage, max_iter=3)
        for hook.trainer.iter in range(3):
            model.zero_grad()
            hook.before_step()
            with torch.autocast("cpu", enabled=amp):
                model(x).sum().backward()
            hook.after_step()
            assert bool(storage.latest()) == (hook.trainer.iter == 2)
        hook.trainer.iter = 3
        hook.after_train()
        values = {key: value for key, (value, _) in storage.latest().items()}

    expected = {
        "change": (model[0](x) - x).norm() / x.norm(),
        "query_difference": affinity.query_difference(model[0].affinity_matrix(x)),
        "grad_norm": torch.cat([p.grad.flatten() for p in model[0].parameters()]).norm(),
        "out_norm": model[0].out.weight.norm(),
    }
    for key, value in expected.items():
        assert values.pop(f"nonlocal/0/{key}") == pytest.approx(value.item(), rel=0.02)
    assert values.pop("nonlocal/1/grad_norm") > 0
    assert values == {"nonlocal/1/change": 0, "nonlocal/1/out_norm": 0}
    message = "1 is still near the identity: it changes its input by 0.00%"
    assert [text.partition(" (")[0] for text in caplog.messages] == [message]
