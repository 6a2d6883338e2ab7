"""What is compared: operations and blocks that compute the same function, and detectors."""

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from detectron2.utils.testing import random_boxes
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from nl_detectron import NonLocalBlock, get_config_file, insert_nonlocal, layers
from nl_detectron.engine import load_config

from .gpu_kernels import torch_attention

FLOOR = "torch.mm"  # the matrix products of ours alone: no implementation can be faster

# By name, a call for each pass, such as "forward"; it returns what all competitors must agree on.
# The first competitor is the reference of the others.
Competitors = dict[str, dict[str, Callable[[], list[Tensor]]]]


def implementations(bench: str, shape: tuple, factory_kwargs: dict, **options) -> Competitors:
    """Return the N x M matrix, ours, and the others that compute the same function.

    ``bench`` is "block", or "op" for the pairwise function alone, given theta, phi and g. ``shape``
    is that of the block's input, (B, C, H, W), and ``options`` are its keyword arguments.
    """
    torch.manual_seed(0)
    options["scale"] = bench == "op" or options["instantiation"] != "gaussian"  # as in mmcv
    block, matrix = NonLocalBlock(shape[1], **options), MatrixBlock(shape[1], **options)
    for parameter in block.out.parameters():
        nn.init.normal_(parameter, std=0.1)  # not zero, which makes the block the identity
    matrix.load_state_dict(block.state_dict())
    modules = {"matrix": matrix, "nl_detectron": block}
    modules |= other_blocks(block) if bench == "block" else {}
    x = torch.randn(shape).to(**factory_kwargs)
    functions, inputs = {name: module.to(x) for name, module in modules.items()}, [x]
    convolutions, pairs = block_products(block, x)
    if bench == "op":
        functions = {"matrix": matrix.aggregate, "nl_detectron": block.aggregate}
        if x.is_cuda and "gaussian" in block.instantiation:
            functions |= torch_attention(block.scale)
        inputs = [torch.randn(t.shape).to(x) for t in block._project(x) if t is not None]
    passes = {name: _passes(function, inputs) for name, function in functions.items()}
    return passes | _floor(pairs if bench == "op" else convolutions + pairs, x)


class MatrixBlock(NonLocalBlock):
    """Our block with plain convolutions and the N x M matrix."""

    def __init__(self, in_channels: int, **options):
        super().__init__(in_channels, **options)
        for conv in self.children():
            if isinstance(conv, Conv2d):
                conv.forward = partial(Conv2d.forward, conv)  # ours is a matrix product on a CPU

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g, unary = self._project(x)
        affinity = self._affinity(theta, phi, unary)  # in memory until the end, as in mmcv and timm
        y = (affinity.to(g.dtype) @ g).transpose(1, 2)
        return x + self.out(y.reshape(len(x), -1, *x.shape[2:]))

    def aggregate(self, theta: Tensor, phi: Tensor, g: Tensor, unary=None) -> Tensor:
        return self._affinity(theta, phi, unary).to(g.dtype) @ g

    def _affinity(self, theta: Tensor, phi: Tensor, unary: Tensor | None) -> Tensor:
        others = [t for t in (self.w_f, unary) if t is not None]
        if self.instantiation not in ("dot_product", "concatenation"):
            others.append(self.scale)
        return getattr(layers, f"{self.instantiation}_affinity")(theta, phi, *others)


def other_blocks(block: NonLocalBlock) -> dict[str, nn.Module]:
    """Return mmcv's or timm's block with the same weights, if installed and with these options."""
    mode, pool, norm = block.instantiation, block.subsample, block.out.norm
    in_mmcv = mode not in ("concatenation", "disentangled") and pool != "pool_conv"
    if in_mmcv and norm is None and find_spec("mmcv"):
        from mmcv.cnn.bricks import NonLocal2d

        # Its pooling drops the last row of odd sides. Its concatenation cannot be trained.
        name, other = "mmcv", NonLocal2d(block.in_channels, mode=mode, sub_sample=pool != "none")
        weights = nn.ModuleList([block.g, block.out, block.theta, block.phi]).parameters()
    elif norm is not None and pool == "none" and find_spec("timm"):
        from timm.layers import NonLocalAttn

        name, other = "timm", NonLocalAttn(block.in_channels, rd_channels=block.bottleneck_channels)
        other.scale = block.scale  # its own is 1 / sqrt(C) by mistake
        bias = torch.zeros(block.in_channels)  # ours has none before the norm
        weights = [*nn.ModuleList([block.theta, block.phi, block.g]).parameters()]
        weights += [block.out.weight, bias, *norm.parameters()]
    else:
        return {}
    vector_to_parameters(parameters_to_vector(weights), other.parameters())
    return {name: other}


def block_products(block: NonLocalBlock, x: Tensor) -> tuple[list[tuple], list[tuple]]:
    """Return sizes (rows, inner, columns) of the matrix products of convolutions, and of pairs."""
    with torch.no_grad():
        theta, _, g, _ = block._project(x)
    (n, d), (m, e) = theta.shape[1:], g.shape[1:]
    source = m if block.subsample == "pool_conv" else n
    positions = {"theta": n, "phi": source, "g": source, "mask": source, "out": n}
    convs = [(name, conv) for name, conv in block.named_children() if isinstance(conv, Conv2d)]
    sizes = [(conv.out_channels, conv.in_channels, positions[name]) for name, conv in convs]
    pairs = {"dot_product": [(d, m, e), (n, d, e)], "concatenation": []}
    pairs = pairs.get(block.instantiation, [(n, d, m), (n, m, e)])
    return len(x) * sizes, len(x) * pairs


def _floor(sizes: list[tuple], x: Tensor) -> Competitors:
    """Return the products of these sizes by torch.mm, and with those of their gradients."""
    factors = [[torch.randn(s).to(x) for s in ((n, k), (k, m), (n, m))] for n, k, m in sizes]

    def multiply(backward: bool) -> None:
        for a, b, c in factors:
            torch.mm(a, b, out=c)
            if backward:
                torch.mm(c, b.t(), out=a)
                torch.mm(a.t(), c, out=b)
                for t in (a, b):
                    t.fill_(0.01)  # or the products would overflow

    passes = {"forward": partial(multiply, False), "forward+backward": partial(multiply, True)}
    return {FLOOR: passes} if sizes else {}


def _passes(function: Callable, inputs: list[Tensor]) -> dict[str, Callable]:
    inputs = [t.requires_grad_() for t in inputs]
    inference, weights = function, []
    if isinstance(function, nn.Module):
        inference, weights = copy.deepcopy(function).eval(), list(function.parameters())

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [inference(*inputs)]

    def forward_backward() -> list[Tensor]:
        y = function(*inputs)
        gradients = torch.autograd.grad(y, [*inputs, *weights], torch.ones_like(y))
        return [y.detach(), *gradients[: len(inputs)]]

    return {"forward": forward, "forward+backward": forward_backward}


def detectors(backbone: str, shape: tuple, factory_kwargs: dict, blocks: list) -> Competitors:
    """Return a baseline Mask R-CNN, and copies of it with blocks, on random images.

    The learning rate is 0, so the blocks remain the identity, and all models find the same boxes.
    ``shape`` is (images, height, width). A dtype of 16 bits means automatic mixed precision.
    ``blocks`` has the sub-sampling and the locations of each copy.
    """
    torch.manual_seed(0)
    images = [random_image(*shape[1:], factory_kwargs["device"]) for _ in range(shape[0])]
    config = get_config_file(f"COCO-InstanceSegmentation/mask_rcnn_{backbone}_FPN_1x.yaml")
    baseline = build_model(load_config(config, ["MODEL.DEVICE", factory_kwargs["device"]]))
    # Frozen batch norm does not normalize the values of random weights, which would overflow.
    for name, buffer in baseline.backbone.named_buffers():
        if name.endswith(("stem.conv1.norm.weight", "conv3.norm.weight")):
            buffer.fill_(0.01)
    # Every box gets a score above the threshold, and so a mask.
    baseline.roi_heads.box_predictor.cls_score.bias.data[0] = 5.0
    models = {"baseline": baseline}
    for subsample, locations in blocks:
        model = copy.deepcopy(baseline)
        names = insert_nonlocal(model, locations, subsample=subsample)
        models[f"+{len(names)} NL, {subsample}"] = model
    return {name: _model_passes(model, images, **factory_kwargs) for name, model in models.items()}


def random_image(height: int, width: int, device: str) -> dict:
    """Return an image of noise with rectangles as objects."""
    boxes = random_boxes(10, min(height, width))  # COCO has 7 objects per image on average
    polygons = [[polygon] for polygon in boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].tolist()]
    objects = Instances((height, width), gt_boxes=Boxes(boxes), gt_masks=PolygonMasks(polygons))
    objects.gt_classes = torch.randint(80, (len(boxes),))
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return {"image": image.to(device), "instances": objects.to(device)}


def _model_passes(model: nn.Module, images: list[dict], dtype: torch.dtype, device: str) -> dict:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    autocast = torch.autocast(device, dtype, enabled=dtype.itemsize == 2)

    def inference() -> list[Tensor]:
        model.eval()
        with torch.no_grad(), autocast:
            return [output["instances"].pred_boxes.tensor for output in model(images)]

    def training_step() -> list[Tensor]:
        model.train()
        torch.manual_seed(0)  # all models sample the same boxes
        with EventStorage(), autocast:
            loss = sum(model(images).values())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return [loss.detach()]

    return {"inference": inference, "training step": training_step}
