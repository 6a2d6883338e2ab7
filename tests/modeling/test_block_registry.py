"""Registered blocks are inserted, trained, loaded, counted and exported like NonLocalBlock."""

import pytest
import torch
from detectors import images, randomize, tiny_config
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from detectron2.utils.events import EventStorage
from torch import nn

from nl_detectron.analysis import analyze_cost
from nl_detectron.checkpoint import AuditedCheckpointer
from nl_detectron.errors import OptionError
from nl_detectron.export import export_model, relative_error
from nl_detectron.layers import NONLOCAL_BLOCK_REGISTRY
from nl_detectron.modeling import build_model, build_optimizer

NAME = "backbone.bottom_up.res4.nonlocal4"


@NONLOCAL_BLOCK_REGISTRY.register()
class UserBlock(CNNBlockBase):
    """A block of a user, without ``multiply_adds`` and with a norm inside."""

    def __init__(self, in_channels, *, reduction=4, norm=""):
        super().__init__(in_channels, in_channels, stride=1)
        inner = in_channels // reduction
        self.down = Conv2d(in_channels, inner, 1, bias=False, norm=get_norm(norm, inner))
        self.out = Conv2d(inner, in_channels, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        return x + self.out(self.down(x))


def block_config(name, *options):
    return tiny_config("MODEL.NONLOCAL.BLOCK", name, "MODEL.NONLOCAL.NORM", "BN", *options)


def test_options_from_a_config():
    """A block gets the keys that its constructor takes; REDUCTION has the default of the block."""
    head = "MODEL.KEYPOINT_ON True MODEL.ROI_KEYPOINT_HEAD.NAME build_nonlocal_keypoint_head"
    model = build_model(block_config("GlobalContextBlock", *head.split()))
    assert model.get_submodule(NAME).down.out_channels == 64 // 16
    assert model.roi_heads.keypoint_head.nonlocal8.down.out_channels == 512 // 16
    model = build_model(block_config("UserBlock", "MODEL.NONLOCAL.REDUCTION", 2))
    assert model.get_submodule(NAME).down.norm.num_features == 64 // 2
    with pytest.raises(OptionError, match="^MODEL.NONLOCAL.BLOCK 'X' is not in .* UserBlock$"):
        build_model(block_config("X"))


@pytest.mark.parametrize("name", ["GlobalContextBlock", "UserBlock"])
def test_train_the_block_only_and_load_it(name, tmp_path, caplog):
    options = "MODEL.NONLOCAL.FREEZE_REST True SOLVER.NONLOCAL_LR_FACTOR 10.0"
    cfg = block_config(name, *options.split())
    model = randomize(build_model(cfg))
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = build_optimizer(cfg, model.train())
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    with EventStorage():
        sum(model(images()).values()).backward()
    optimizer.step()
    changed = {key for key, tensor in model.state_dict().items() if not tensor.equal(start[key])}
    in_block = {key for key in start if key.startswith(NAME)}
    assert in_block - {f"{NAME}.mask.bias"} <= changed <= in_block

    AuditedCheckpointer(model, str(tmp_path)).save("block")
    with caplog.at_level("INFO", "nl_detectron"):
        AuditedCheckpointer(build_model(cfg)).load(str(tmp_path / "block.pth"))
    count = len([key for key in in_block if not key.endswith("num_batches_tracked")])
    assert f"{count}/{count} in res4.nonlocal4" in caplog.text


def test_cost():
    """torch counts the block without multiply_adds."""
    formulas = {"GlobalContextBlock": 2 * 24 * 64 + 2 * 64 * 4, "UserBlock": 2 * 24 * 64 * 16}
    for name, count in formulas.items():
        (plain, model), rows = analyze_cost(block_config(name), [(64, 96)])
        assert rows[2]["GMAC"] == count / 1e9
        assert model["GMAC"] - plain["GMAC"] == pytest.approx(count / 1e9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", [("BLOCK", "GlobalContextBlock"), ("UNIT_NORM", True)])
@pytest.mark.parametrize("format", ["torchscript-script", "torch-export", "onnx"])
def test_export(format, options, tmp_path):
    backbone = build_model(tiny_config(f"MODEL.NONLOCAL.{options[0]}", options[1])).backbone.eval()
    torch.nn.init.normal_(backbone.bottom_up.res4.nonlocal4.out.weight)
    file, image = str(tmp_path / "model.pt2"), torch.randn(1, 3, 96, 224)
    export_model(backbone, torch.randn(2, 3, 128, 160), format, file)
    assert relative_error(backbone, image, format, file) < 1e-4
