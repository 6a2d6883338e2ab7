"""Blocks in automatic mixed precision, on the CPU."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from test_model import images

from nl_detectron import NonLocalBlock
from nl_detectron.engine import load_config
from nl_detectron.layers import INSTANTIATIONS

TINY = str(Path(__file__).parents[1] / "mask_rcnn_tiny.yaml")
DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_the_operation_keeps_its_precision(instantiation, dtype):
    """Autocast, which would cast its products down, changes no bit of it, nor of its gradients."""
    torch.manual_seed(0)
    block = NonLocalBlock(16, instantiation=instantiation)
    inner = block.bottleneck_channels
    width = 16 if instantiation == "gaussian" else inner
    shapes = [(2, 30, width), (2, 20, width), (2, 20, inner)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expected = block.aggregate(*inputs)
    with torch.autocast("cpu", dtype):
        actual = block.aggregate(*inputs)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    cotangent = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (actual, expected))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_block(instantiation, dtype):
    """Within a few roundings to the narrow format of what float32 gives."""
    torch.manual_seed(0)
    block = NonLocalBlock(32, instantiation=instantiation)
    torch.nn.init.normal_(block.out.weight, std=0.1)
    x = torch.randn(2, 32, 9, 7)
    with torch.no_grad():
        expected = block(x) - x
        with torch.autocast("cpu", dtype):
            actual = block(x) - x
    bound = 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_mask_rcnn_trains(instantiation, dtype):
    """Finite throughout, and the block learns; float16 with the scaler that it always needs."""
    torch.manual_seed(0)
    options = ["MODEL.NONLOCAL.INSTANTIATION", instantiation, "MODEL.ROI_HEADS.NUM_CLASSES", "80"]
    model = build_model(load_config(TINY, options)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
    batch, totals = images(), []
    with EventStorage():
        for _ in range(8):
            with torch.autocast("cpu", dtype):
                losses = model(batch)
            totals.append(sum(losses.values()))
            optimizer.zero_grad()
            scaler.scale(totals[-1]).backward()
            scaler.step(optimizer)
            scaler.update()
    assert torch.stack(totals).isfinite().all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.backbone.bottom_up.res4.nonlocal4.out.weight.norm() > 0
    if scaler.is_enabled():
        assert scaler.get_scale() >= 64  # few steps, if any, were left out
