"""A trained detector with new blocks: the blocks alone learn, or at a rate of their own."""

import json
import re

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.utils.events import EventStorage
from nl_detectron.engine.optimizer import build_optimizer, override_nonlocal
from test_train_net import TINY, message_of
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nl_detectron import NonLocalBlock
from nl_detectron.data import generate
from nl_detectron.engine import Trainer, UserError, load_config
from nl_detectron.engine.hooks import NonLocalNorms
from nl_detectron.modeling import freeze_rest

BLOCK = "backbone.bottom_up.res4.nonlocal4"
PLAIN = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
FREEZE_REST = ("MODEL.NONLOCAL.FREEZE_REST", True)
STATISTICS = ("running_mean", "running_var")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = generate(tmp_path_factory.mktemp("datasets") / "nl_synthetic", {"train": 8})
    register_coco_instances("fine_tuning_train", {}, str(root / "train.json"), str(root / "train"))


def config(*options):
    data = ["DATASETS.TRAIN", ("fine_tuning_train",), "DATASETS.TEST", ()]
    return load_config(TINY, overrides=[*data, "MODEL.DEVICE", "cpu", *options])


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A plain detector's checkpoint; BN's statistics are as if it had seen images."""
    torch.manual_seed(0)
    model = build_detectron2_model(config(*PLAIN))
    for name, value in model.state_dict().items():
        if name.endswith(STATISTICS):
            nn.init.uniform_(value, 0.5, 1.5)
    folder = tmp_path_factory.mktemp("trained")
    DetectionCheckpointer(model, str(folder)).save("model_final")
    return folder / "model_final.pth"


@pytest.fixture
def train(trained, tmp_path):
    """The tensors at the start and at the end of a short training, and its metrics."""

    def run(*options):
        cfg = config("MODEL.WEIGHTS", str(trained), "OUTPUT_DIR", str(tmp_path), *options)
        torch.manual_seed(3)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        lines = (tmp_path / "metrics.json").read_text().splitlines()
        return start, trainer.model.state_dict(), json.loads(lines[-1])

    return run


@pytest.mark.parametrize("norm", ["", "BN"])
def test_blocks_alone(train, trained, norm):
    """After some steps every other tensor, statistics too, is what the checkpoint has."""
    start, end, metrics = train(*FREEZE_REST, "MODEL.NONLOCAL.NORM", norm)
    file = torch.load(trained, map_location="cpu")["model"]
    assert any(name.endswith(STATISTICS) for name in file)
    for name, value in file.items():
        if not name.endswith("num_batches_tracked"):  # release 0.5 has no such in FrozenBN
            assert torch.equal(end[name], value), name

    learned = {n for n in end if n.startswith(BLOCK) and not torch.equal(end[n], start[n])}
    # The softmax does not see phi's bias, which adds the same to all products of a query.
    assert learned | {f"{BLOCK}.phi.bias"} == {n for n in end if n.startswith(BLOCK)}
    assert metrics[f"nonlocal/{BLOCK}/out_norm"] > 0
    assert metrics[f"nonlocal/{BLOCK}/grad_norm"] > 0


def test_all_learn_without_it(train, trained):
    start, end, _ = train()
    file = torch.load(trained, map_location="cpu")["model"]
    same = {name for name, value in file.items() if torch.equal(end[name], value)}
    assert not any(name.endswith((*STATISTICS, "conv1.weight")) for name in same)
    assert all(torch.equal(start[name], value) for name, value in file.items())


def test_no_unused_parameter(images):
    """DistributedDataParallel refuses a second step if the first left a parameter out."""
    cfg = config(*FREEZE_REST)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(Trainer.build_model(cfg), broadcast_buffers=False)
        batches = iter(Trainer.build_train_loader(cfg))
        with EventStorage():
            for _ in range(2):
                sum(model.train()(next(batches)).values()).backward()
    finally:
        distributed.destroy_process_group()
    gradients = {name for name, p in model.module.named_parameters() if p.grad is not None}
    assert gradients == {n for n, _ in model.module.named_parameters() if n.startswith(BLOCK)}


def test_frozen_model_says_the_same():
    """In evaluation, bit for bit."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), NonLocalBlock(8, norm="BN"))
    for module in (model[1], model[2].out.norm):
        for value in module.state_dict().values():
            if value.is_floating_point():
                nn.init.uniform_(value, 0.5, 1.5)
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = model.eval()(x)
        assert freeze_rest(model) is model
        assert torch.equal(model(x), expected)
    assert isinstance(model[2].out.norm, nn.BatchNorm2d)


def test_freeze_rest_without_block():
    with pytest.raises(ValueError, match="^MODEL.NONLOCAL.FREEZE_REST .* no non-local block"):
        freeze_rest(nn.Conv2d(3, 8, 3))


def rates(optimizer, model):
    """Name of each parameter -> learning rate and weight decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [
        (names[parameter], (group["lr"], group["weight_decay"], group["momentum"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(dict(found)) == len(found)
    assert all(group["params"] for group in optimizer.param_groups)
    return dict(found)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("factor, decay", [(1.0, None), (10.0, None), (1.0, 0.0), (0.5, 0.03)])
def test_rates_of_the_blocks(factor, decay, clip):
    cfg = config(
        *("SOLVER.NONLOCAL_LR_FACTOR", factor, "SOLVER.WEIGHT_DECAY_NONLOCAL", decay),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", clip, "MODEL.NONLOCAL.NORM", "BN"),
        *("SOLVER.WEIGHT_DECAY_NORM", 0.2, "SOLVER.BIAS_LR_FACTOR", 2.0),
        *("SOLVER.WEIGHT_DECAY_BIAS", 0.4),
    )
    model = build_detectron2_model(cfg)
    plain, optimizer = build_detectron2_optimizer(cfg, model), build_optimizer(cfg, model)
    expected = rates(plain, model)
    assert {lr for lr, *_ in expected.values()} == {0.01, 0.02}
    assert {d for _, d, _ in expected.values()} == {1e-4, 0.2, 0.4}
    for name, (lr, weight_decay, momentum) in expected.items():
        if name.startswith(BLOCK):
            weight_decay = weight_decay if decay is None else decay
            expected[name] = (lr * factor, weight_decay, momentum)
    assert rates(optimizer, model) == expected
    assert type(optimizer).__name__ == type(plain).__name__ == "SGD" + "WithGradientClip" * clip
    assert optimizer.defaults == plain.defaults


def test_the_schedule_scales_every_rate(images, tmp_path):
    trainer = Trainer(config("SOLVER.NONLOCAL_LR_FACTOR", 10.0, "OUTPUT_DIR", str(tmp_path)))
    seen = []
    for _ in range(3):
        found = rates(trainer.optimizer, trainer.model).items()
        (other,) = {lr for name, (lr, *_) in found if not name.startswith(BLOCK)}
        (block,) = {lr for name, (lr, *_) in found if name.startswith(BLOCK)}
        assert block == pytest.approx(10 * other)
        seen.append(other)
        trainer.optimizer.step()  # without gradients
        trainer.scheduler.step()
    assert seen[0] < seen[1] < seen[2]  # the warm-up


def test_optimizer_of_ones_own():
    """As a LazyConfig makes it, or anybody."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), NonLocalBlock(8), nn.Conv2d(8, 8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25, weight_decay=0.5)
    override_nonlocal(optimizer, model, lr_factor=4, weight_decay=0)
    groups = [(g["lr"], g["weight_decay"], g["params"]) for g in optimizer.param_groups]
    assert [group[:2] for group in groups] == [(0.25, 0.5), (1.0, 0)]
    assert set(groups[1][2]) == set(model[1].parameters())
    assert set(groups[0][2]) == {*model[0].parameters(), *model[2].parameters()}


@pytest.mark.parametrize(
    "key, value",
    [
        ("NONLOCAL_LR_FACTOR", 0.0),
        ("NONLOCAL_LR_FACTOR", -1.0),
        ("NONLOCAL_LR_FACTOR", float("nan")),
        ("NONLOCAL_LR_FACTOR", float("inf")),
        ("WEIGHT_DECAY_NONLOCAL", -0.1),
        ("WEIGHT_DECAY_NONLOCAL", "none"),
        ("WEIGHT_DECAY_NONLOCAL", True),
        ("WEIGHT_DECAY_NONLOCAL", float("nan")),
    ],
)
def test_bad_rate(key, value):
    cfg = config(f"SOLVER.{key}", value)
    model = nn.Sequential(NonLocalBlock(8))
    with pytest.raises(UserError, match=f"^SOLVER.{key} {re.escape(repr(value))} must be a "):
        Trainer.build_optimizer(cfg, model)


def test_rate_of_no_block():
    with pytest.raises(ValueError, match="nothing to act on: .* no parameter of a non-local block"):
        build_optimizer(config("SOLVER.NONLOCAL_LR_FACTOR", 2.0), nn.Conv2d(3, 8, 1))


@pytest.mark.parametrize(
    "options, message",
    [
        ("SOLVER.NONLOCAL_LR_FACTOR 2.0", "SOLVER.NONLOCAL_LR_FACTOR is set, but .* no block"),
        ("SOLVER.WEIGHT_DECAY_NONLOCAL 0", "SOLVER.WEIGHT_DECAY_NONLOCAL is set, but .* no block"),
        ("MODEL.NONLOCAL.FREEZE_REST True MODEL.WEIGHTS a.pth", "MODEL.NONLOCAL is set, but .*"),
    ],
)
def test_keys_of_blocks_that_are_not_there(capsys, options, message):
    said = message_of(capsys, "--config-file", TINY, *PLAIN, *options.split(" "))
    assert re.match(message, said) and "\n" not in said


def test_nothing_to_freeze(capsys):
    said = message_of(capsys, "--config-file", TINY, "MODEL.NONLOCAL.FREEZE_REST", "True")
    assert said.startswith("MODEL.NONLOCAL.FREEZE_REST") and "MODEL.WEIGHTS is empty" in said


class Step:
    """What the hook wants to know of a trainer."""

    iter, max_iter = 19, 100


@pytest.mark.parametrize("norm", ["", "GN"])
def test_norms_that_are_written(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(64, 64, 1)))
    block = NonLocalBlock(64, norm=norm)
    model[0].add_module("nonlocal0", block)
    hook = NonLocalNorms(model)
    hook.trainer = Step()
    starts_at_zero = block.out.norm.weight if norm else block.out.weight
    nn.init.normal_(starts_at_zero)
    with EventStorage() as hook.trainer.storage:
        hook.after_step()
        written = {k: v for k, (v, _) in hook.trainer.storage.latest().items()}
        assert written["nonlocal/0.nonlocal0/grad_norm"] == 0  # nothing reached it
        model(torch.randn(2, 64, 5, 6)).square().sum().backward()
        hook.after_step()
        written = {k: v for k, (v, _) in hook.trainer.storage.latest().items()}
    out = starts_at_zero.double().norm()
    gradient = torch.cat([p.grad.double().flatten() for p in block.parameters()])
    assert written == {
        "nonlocal/0.nonlocal0/out_norm": pytest.approx(out.item(), rel=1e-6),
        "nonlocal/0.nonlocal0/grad_norm": pytest.approx(gradient.norm().item(), rel=1e-6),
    }
