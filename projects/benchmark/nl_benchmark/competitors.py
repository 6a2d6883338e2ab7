"""What is compared: operations and blocks that compute the same function, and detectors."""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from nl_detectron import NonLocalBlock, get_config_file, insert_nonlocal, layers
from nl_detectron.engine import load_config

CONFIG = "COCO-InstanceSegmentation/mask_rcnn_{}_FPN_1x.yaml"
MMCV_MODES = ("gaussian", "embedded_gaussian", "dot_product")  # concatenation cannot be trained
WITH_SCALE = ("gaussian", "embedded_gaussian", "disentangled")
FLOOR = "torch.mm"  # the matrix products of ours alone: no implementation can be faster
OBJECTS = 10  # per training image; COCO has 7 on average

# For each pass, such as "forward", a call to time. It returns what all competitors must agree on.
Passes = dict[str, Callable[[], list[Tensor]]]
Competitors = dict[str, Passes]  # by name; the first is the reference of the others


def operations(
    function: str, subsample: str, shape: tuple, dtype: torch.dtype, device: str
) -> Competitors:
    """Return a pairwise function with its N x M matrix, ours, and torch's attention on a GPU."""
    batch, channels, height, width = shape
    n, m = height * width, _keys(subsample, height, width)
    keys = channels if function == "gaussian" else channels // 2  # the Gaussian's theta is x
    scale = {"scale": keys**-0.5} if function in WITH_SCALE else {}
    ours, affinity = getattr(layers, function), getattr(layers, f"{function}_affinity")

    def matrix(theta, phi, g, *others, **scale):
        return affinity(theta, phi, *others, **scale).to(g.dtype) @ g

    torch.manual_seed(0)
    shapes = [(batch, n, keys), (batch, m, keys), (batch, m, channels // 2)]
    if function == "concatenation":
        shapes.append((2 * keys,))  # w_f
    if function == "disentangled":
        shapes.append((batch, m))  # mask
    inputs = [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]
    forms = {"matrix": matrix, "nl_detectron": ours}
    if device == "cuda" and "gaussian" in function:
        forms |= torch_attention()
    forms = {name: partial(form, **scale) for name, form in forms.items()}
    sizes = batch * _pair_products(function, n, m, keys, channels // 2)
    floor = {FLOOR: products(sizes, dtype, device)} if sizes else {}
    return {name: passes_of(form, inputs) for name, form in forms.items()} | floor


def torch_attention() -> dict[str, Callable]:
    """Return attention by each of torch's backends, and FlexAttention."""
    from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

    def attention(backend, *inputs, scale):
        with sdpa_kernel(backend):
            return layers.affinity._fused_attention(*inputs, scale)

    def flex(theta, phi, g, scale):
        inputs = (t.unsqueeze(1) for t in (theta, phi, g))
        return compiled(*inputs, scale=scale).squeeze(1)

    torch.compiler.reset()  # after a number of compilations it would run without
    compiled = torch.compile(flex_attention.flex_attention, dynamic=True)
    names = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    forms = {name.lower(): partial(attention, getattr(SDPBackend, name)) for name in names}
    return forms | {"flex_attention": flex}


def _keys(subsample: str, height: int, width: int) -> int:
    return height * width if subsample == "none" else -(-height // 2) * -(-width // 2)


def _pair_products(function: str, n: int, m: int, d: int, e: int) -> list[tuple[int, int, int]]:
    """Return the sizes (rows, inner, columns) of the products over pairs of positions."""
    if function == "concatenation":
        return []
    if function == "dot_product" and n * m * (d + e) >= (n + m) * d * e:
        return [(d, m, e), (n, d, e)]
    return [(n, d, m), (n, m, e)]


def products(sizes: list[tuple], dtype: torch.dtype, device: str) -> Passes:
    """Return the products of these sizes by torch.mm, and with those of their gradients."""

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    factors = [(matrix(n, k), matrix(k, m), matrix(n, m)) for n, k, m in sizes]

    def forward() -> None:
        for a, b, c in factors:
            torch.mm(a, b, out=c)

    def forward_backward() -> None:
        for a, b, c in factors:
            torch.mm(a, b, out=c)
            torch.mm(c, b.t(), out=a)
            torch.mm(a.t(), c, out=b)
            for t in (a, b):
                t.fill_(0.01)  # or the products would overflow

    return {"forward": forward, "forward+backward": forward_backward}


def blocks(
    function: str, norm: str, subsample: str, shape: tuple, dtype: torch.dtype, device: str
) -> Competitors:
    """Return our block with its N x M matrix, ours, and mmcv's or timm's if it has the options."""
    torch.manual_seed(0)
    options = {"instantiation": function, "subsample": subsample, "norm": norm}
    options["scale"] = function != "gaussian"  # as in mmcv
    block, matrix = NonLocalBlock(shape[1], **options), MatrixBlock(shape[1], **options)
    nn.init.kaiming_normal_(block.out.weight)  # not zero, which makes the block the identity
    if norm:
        nn.init.ones_(block.out.norm.weight)
    matrix.load_state_dict(block.state_dict())
    modules = {"matrix": matrix, "nl_detectron": block}
    if not norm and subsample != "pool_conv" and function in MMCV_MODES:
        modules["mmcv"] = mmcv_block(block)
    elif (function, norm, subsample) == ("embedded_gaussian", "BN", "none"):
        modules["timm"] = timm_block(block)
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    passes = {name: passes_of(module.to(device, dtype), [x]) for name, module in modules.items()}
    sizes = shape[0] * block_products(block, *shape[2:])
    return passes | {FLOOR: products(sizes, dtype, device)}


def block_products(block: NonLocalBlock, height: int, width: int) -> list[tuple[int, int, int]]:
    """Return the sizes (rows, inner, columns) of the matrix products of a block on one input."""
    c, d, n = block.in_channels, block.bottleneck_channels, height * width
    m = _keys(block.subsample, height, width)
    source = m if block.subsample == "pool_conv" else n
    sizes = [(d, c, source), (c, d, n)]  # g, W_z
    if block.instantiation == "gaussian":
        return sizes + _pair_products("gaussian", n, m, c, d)
    sizes += [(d, c, n), (d, c, source)]  # theta, phi
    if block.instantiation == "disentangled":
        sizes += [(1, c, source), (1, m, d)]  # mask, its sum of g
    return sizes + _pair_products(block.instantiation, n, m, d, d)


class MatrixBlock(NonLocalBlock):
    """A block of plain convolutions and the N x M matrix; it shares only the parameters of ours."""

    def forward(self, x: Tensor) -> Tensor:
        def conv(layer: nn.Module, x: Tensor) -> Tensor:
            plain = isinstance(layer, nn.Conv2d)
            return F.conv2d(x, layer.weight, layer.bias) if plain else layer(x)

        pool = partial(F.max_pool2d, kernel_size=2, ceil_mode=True)
        source = pool(x) if self.subsample == "pool_conv" else x
        theta, phi, g = conv(self.theta, x), conv(self.phi, source), conv(self.g, source)
        if self.subsample == "conv_pool":
            phi, g = pool(phi), pool(g)
        theta, phi, g = (t.flatten(2).transpose(1, 2) for t in (theta, phi, g))
        scale = {"scale": self.scale} if self.instantiation in WITH_SCALE else {}
        others = [] if self.w_f is None else [self.w_f]
        if self.instantiation == "disentangled":
            theta, phi = theta - theta.mean(1, keepdim=True), phi - phi.mean(1, keepdim=True)
            mask = conv(self.mask, source)
            others = [(pool(mask) if self.subsample == "conv_pool" else mask).flatten(1)]
        affinity = getattr(layers, f"{self.instantiation}_affinity")(theta, phi, *others, **scale)
        y = (affinity.to(g.dtype) @ g).transpose(1, 2)
        z = conv(self.out, y.reshape(len(x), -1, *x.shape[2:]))
        return x + (z if self.out.norm is None else self.out.norm(z))


def mmcv_block(block: NonLocalBlock) -> nn.Module:
    """Return mmcv's block with the same weights; its pooling drops the last row of odd sides."""
    from mmcv.cnn.bricks import NonLocal2d

    pool = block.subsample == "conv_pool"
    other = NonLocal2d(block.in_channels, mode=block.instantiation, sub_sample=pool)
    layers = nn.ModuleList([block.g, block.out, block.theta, block.phi])
    return _with_weights(other, list(layers.parameters()))


def timm_block(block: NonLocalBlock) -> nn.Module:
    """Return timm's block with the same weights and scale; its own is 1 / sqrt(C) by mistake."""
    from timm.layers import NonLocalAttn

    other = NonLocalAttn(block.in_channels, rd_channels=block.bottleneck_channels)
    other.scale = block.scale
    layers = nn.ModuleList([block.theta, block.phi, block.g])
    out = [block.out.weight, torch.zeros(block.in_channels), *block.out.norm.parameters()]
    return _with_weights(other, [*layers.parameters(), *out])  # ours has no bias before the norm


@torch.no_grad()
def _with_weights(module: nn.Module, weights: list[Tensor]) -> nn.Module:
    for parameter, weight in zip(module.parameters(), weights, strict=True):
        parameter.copy_(weight.view_as(parameter))
    return module


def passes_of(function: Callable, inputs: list[Tensor]) -> Passes:
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


def detectors(
    backbone: str, locations: list, subsamples: list, shape: tuple, dtype: torch.dtype, device: str
) -> Competitors:
    """Return a baseline Mask R-CNN, and copies of it with blocks, on random images.

    New blocks are the identity and stay so, since the learning rate is 0. All models therefore find
    the same boxes and do the same work outside the blocks. They share the baseline's weights.
    ``shape`` is the number of images, their height and width; a ``dtype`` of 16 bits means
    automatic mixed precision.
    """
    torch.manual_seed(0)
    images = [random_image(*shape[1:], device) for _ in range(shape[0])]
    cfg = load_config(get_config_file(CONFIG.format(backbone)), ["MODEL.DEVICE", device])
    baseline = build_model(cfg)
    # Frozen batch norm does not normalize the values of random weights, which would overflow.
    nn.init.constant_(baseline.backbone.bottom_up.stem.conv1.norm.weight, 0.01)
    for module in baseline.modules():
        if isinstance(module, BottleneckBlock):
            nn.init.constant_(module.conv3.norm.weight, 0.1)
    # Every box gets a score above the threshold, and so a mask.
    baseline.roi_heads.box_predictor.cls_score.bias.data[0] = 5.0
    shared = {id(tensor): tensor for tensor in [*baseline.parameters(), *baseline.buffers()]}
    models = {"baseline": baseline}
    for subsample in subsamples:
        for location in locations:
            model = copy.deepcopy(baseline, dict(shared))
            names = insert_nonlocal(model, location, subsample=subsample)
            models[f"+{len(names)} NL, {subsample}"] = model
    return {name: _model_passes(model, images, dtype, device) for name, model in models.items()}


def random_image(height: int, width: int, device: str) -> dict:
    """Return an image of noise; its objects are rectangles, 1/8 to 1/2 as long as its sides."""
    sides = torch.tensor([width, height])
    box_sides = sides * (1 / 8 + 3 / 8 * torch.rand(OBJECTS, 2))
    corners = (sides - box_sides) * torch.rand(OBJECTS, 2)
    boxes = torch.cat([corners, corners + box_sides], dim=1)
    polygons = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.tolist()]
    objects = Instances((height, width), gt_boxes=Boxes(boxes), gt_masks=PolygonMasks(polygons))
    objects.gt_classes = torch.randint(80, (OBJECTS,))
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return {"image": image.to(device), "instances": objects.to(device)}


def _model_passes(model: nn.Module, images: list[dict], dtype: torch.dtype, device: str) -> Passes:
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
