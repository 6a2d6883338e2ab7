"""GlobalContextBlock against the block of mmcv."""

import pytest
import torch
from test_affinity import assert_near
from test_nonlocal_block import make_input
from torch import nn

from nl_detectron.analysis import count_multiply_adds
from nl_detectron.checkpoint.conversion import convert
from nl_detectron.layers import GlobalContextBlock


def test_block_equals_that_of_mmcv():
    mmcv = pytest.importorskip("mmcv.cnn")
    theirs = mmcv.ContextBlock(8, ratio=1 / 2).double()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    weights = {f"layer2.0.context_block1.{key}": t for key, t in theirs.state_dict().items()}
    tensors, _ = convert(weights, "mmdet")
    ours = GlobalContextBlock(8, reduction=2).double()
    ours.load_state_dict({key.removeprefix("res3.nonlocal0."): t for key, t in tensors.items()})

    x = make_input(2, 8, 4, 6).requires_grad_()
    results, cotangent = (ours(x), theirs(x)), torch.randn_like(x)
    assert_near(*results)
    assert_near(*(torch.autograd.grad(z, x, cotangent, True)[0] for z in results))
    for batch, *size in ((2, 24), (2, 2, 2, 6), (0, 4, 6)):
        z = ours(x[:batch].reshape(batch, 8, *size))
        assert_near(z.flatten(2), results[0][:batch].flatten(2))
    count = count_multiply_adds(ours.to("meta"), torch.empty_like(x, device="meta"))
    assert count == 2 * ours.multiply_adds(4, 6)
