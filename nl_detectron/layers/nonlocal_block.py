"""The non-local block of Wang et al., CVPR 2018, Sec. 3.3 (https://arxiv.org/abs/1711.07971)."""

import math

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..errors import OptionError
from . import affinity

INSTANTIATIONS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation", "disentangled")
SUBSAMPLES = ("none", "conv_pool", "pool_conv")
NORMS = ("", "BN", "SyncBN", "GN")

NONLOCAL_BLOCK_REGISTRY = Registry("NONLOCAL_BLOCK")
NONLOCAL_BLOCK_REGISTRY.__doc__ = """
The blocks that can be inserted into a model: subclasses of ``CNNBlockBase``, called as
``Block(in_channels, **options)``, whose input and output have the same shape.
"""


class PointwiseConv(Conv2d):
    """A 1x1 convolution of (B, C, *space).

    On a CPU it is computed as a matrix product, which is faster, above all in bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        size = list(x.shape)
        size[1] = self.out_channels
        x, bias = x.flatten(2), self.bias
        if x.is_cpu:
            weight = self.weight.flatten(1).expand(size[0], -1, -1)
            if bias is None:
                y = torch.bmm(weight, x)
            else:
                y = torch.baddbmm(bias.unsqueeze(1), weight, x)
        else:
            y = F.conv2d(x.unsqueeze(3), self.weight, bias)
        y = y.reshape(size)
        return y if self.norm is None else self.norm(y)


@NONLOCAL_BLOCK_REGISTRY.register()
class NonLocalBlock(CNNBlockBase):
    """``z = W_z y + x`` (Eq. 6), where y is the non-local operation on x (Eq. 1).

    Input and output are (B, C, L), (B, C, H, W) or (B, C, T, H, W); N and M are products of the
    sizes of space and time, before and after sub-sampling. A new block is the identity: it can be
    inserted into a trained model without changing its output.

    Attributes:
        theta, phi, g (nn.Module): the embeddings of the paper, C -> D channels; ``theta`` and
            ``phi`` are identities in the Gaussian instantiation.
        mask (nn.Module): C -> 1 channels, the unary term; only for disentangled, else an identity.
        out (PointwiseConv): W_z of the paper, D -> C channels, and the norm after it.
        w_f (nn.Parameter or None): (2 D), the weights of Eq. 5; only for concatenation.
        log_scale (nn.Parameter or None): logarithm of the learnt scale of ``unit_norm``.
        bottleneck_channels (int): D.
    """

    # State-dict version. Increase it when a parameter is renamed, and convert old keys on load.
    _version = 1

    def __init__(
        self,
        in_channels: int,
        *,
        instantiation: str = "embedded_gaussian",
        scale: bool = True,
        temperature: float = 1.0,
        unit_norm: bool = False,
        reduction: int = 2,
        bottleneck_channels: int | None = None,
        subsample: str = "pool_conv",
        norm: str = "",
    ):
        """
        Args:
            in_channels: C, the channels of input and output.
            instantiation: the pairwise function of Sec. 3.2: "gaussian", "embedded_gaussian",
                "dot_product" or "concatenation"; or "disentangled" of Yin et al., ECCV 2020.
            scale: divide the inner products by the square root of their length before the softmax,
                as in the authors' released code; False is Eq. 2 and 3 of the paper. Ignored by the
                instantiations without softmax, dot product and concatenation.
            temperature: divide the inner products by this number, too; 0.05 in Yin et al.
            unit_norm: normalize theta and phi to length 1, and use a learnt scale, which starts at
                10, in place of ``scale`` and ``temperature``; only for the embedded Gaussian.
            reduction: D = C // reduction; 2 in the paper.
            bottleneck_channels: D; overrides ``reduction``.
            subsample: 2x2 max pooling of phi and g (Sec. 3.3). "conv_pool" pools after the
                convolutions, as in the paper; "pool_conv" pools before them, as in the released
                code, which is a different function and cheaper; "none" does not pool. Inputs of 5
                dimensions are pooled in H and W only. Odd sizes are rounded up.
            norm: "", "BN", "SyncBN" or "GN" after W_z. The scale of the norm starts at zero
                (Sec. 4.1); without a norm, W_z starts at zero. FrozenBN is not allowed: its scale
                is not trained, so the block would remain the identity.

        Raises:
            OptionError: if an option has an invalid value.
        """
        super().__init__(in_channels, in_channels, stride=1)
        _check_choice("instantiation", instantiation, INSTANTIATIONS)
        _check_choice("subsample", subsample, SUBSAMPLES)
        _check_choice("norm", norm, NORMS)
        if not 0 < temperature < math.inf:
            raise OptionError("temperature", f"{temperature!r} must be a positive number")
        if unit_norm and instantiation != "embedded_gaussian":
            problem = f"True needs instantiation 'embedded_gaussian', not {instantiation!r}"
            raise OptionError("unit_norm", problem)
        if norm == "GN" and in_channels % 32:
            problem = f"'GN' has 32 groups, which do not divide {in_channels} channels"
            raise OptionError("norm", problem)
        if bottleneck_channels is None:
            bottleneck_channels = reduce_channels(in_channels, reduction)
        if not 1 <= bottleneck_channels <= in_channels:
            problem = f"must be from 1 to {in_channels}, the channels of the input"
            raise OptionError("bottleneck_channels", f"{bottleneck_channels} {problem}")

        self.instantiation = instantiation
        self.subsample = subsample
        self.bottleneck_channels = bottleneck_channels
        embed = instantiation != "gaussian"
        inner_product = bottleneck_channels if embed else in_channels
        self.scale = (inner_product**-0.5 if scale else 1.0) / temperature
        if unit_norm:
            self.scale = 1.0  # _project() multiplies theta by the learnt scale

        self.theta = PointwiseConv(in_channels, bottleneck_channels, 1) if embed else nn.Identity()
        self.phi = PointwiseConv(in_channels, bottleneck_channels, 1) if embed else nn.Identity()
        self.g = PointwiseConv(in_channels, bottleneck_channels, 1)
        self.out = PointwiseConv(
            bottleneck_channels, in_channels, 1, bias=not norm, norm=get_norm(norm, in_channels)
        )
        unary = instantiation == "disentangled"
        self.mask = PointwiseConv(in_channels, 1, 1) if unary else nn.Identity()
        self.register_parameter("log_scale", nn.Parameter(torch.empty(())) if unit_norm else None)
        self.register_parameter("w_f", None)
        if instantiation == "concatenation":
            self.w_f = nn.Parameter(torch.empty(2 * bottleneck_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Apply the He initialization of the paper, and make the block the identity."""
        for layer in (self.theta, self.phi, self.g, self.out):
            if isinstance(layer, nn.Conv2d):
                weight_init.c2_msra_fill(layer)
        if isinstance(self.mask, nn.Conv2d):
            nn.init.kaiming_normal_(self.mask.weight)  # with fan_in, because fan_out is 1
            nn.init.zeros_(self.mask.bias)
        if self.log_scale is not None:
            nn.init.constant_(self.log_scale, math.log(10))
        if self.w_f is not None:
            nn.init.normal_(self.w_f, std=math.sqrt(2 / self.w_f.numel()))
        nn.init.zeros_(self.out.weight if self.out.norm is None else self.out.norm.weight)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        version = local_metadata.get("version", self._version)
        if version > self._version:
            args[-1].append(  # error_msgs
                f"{prefix[:-1]} was saved by a later nl_detectron (version {version} of the block, "
                f"here {self._version}): upgrade nl_detectron"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, *space) to the same shape."""
        theta, phi, g, unary = self._project(x)
        y = self.aggregate(theta, phi, g, unary)
        return x + self.out(y.transpose(1, 2).unsqueeze(3)).reshape(x.shape)

    def embeddings(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return theta (B, N, D) and phi (B, M, D) of x; M = N without sub-sampling."""
        return self._project(x)[:2]

    def values(self, x: Tensor) -> Tensor:
        """Return g (B, M, D) of x."""
        return self._project(x)[2]

    def aggregate(
        self, theta: Tensor, phi: Tensor, g: Tensor, unary: Tensor | None = None
    ) -> Tensor:
        """Return y (B, N, D) of Eq. 1, computed without autocast: some steps need float32."""
        if not torch.jit.is_scripting():
            device = theta.device.type
            # torch 2.4 cannot compile is_autocast_available.
            available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
            if available and torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return self._aggregate(theta, phi, g, unary)
        return self._aggregate(theta, phi, g, unary)

    def _aggregate(self, theta: Tensor, phi: Tensor, g: Tensor, unary: Tensor | None) -> Tensor:
        if unary is not None:
            return affinity.disentangled(theta, phi, g, unary, self.scale)
        if self.instantiation == "gaussian":
            return affinity.gaussian(theta, phi, g, self.scale)
        if self.instantiation == "embedded_gaussian":
            return affinity.embedded_gaussian(theta, phi, g, self.scale)
        w_f = self.w_f
        if w_f is None:
            return affinity.dot_product(theta, phi, g)
        return affinity.concatenation(theta, phi, g, w_f)

    @torch.jit.unused
    def affinity_matrix(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """Return the matrix f / C(x) of Eq. 1, (B, N, M); the forward pass does not build it.

        With ``queries``, indices of Q query positions, return only their rows, (B, Q, M).
        """
        theta, phi, _, unary = self._project(x)
        if queries is not None:
            theta = theta[:, queries]
        if unary is not None:
            return affinity.disentangled_affinity(theta, phi, unary, self.scale)
        if self.instantiation == "gaussian":
            return affinity.gaussian_affinity(theta, phi, self.scale)
        if self.instantiation == "embedded_gaussian":
            return affinity.embedded_gaussian_affinity(theta, phi, self.scale)
        if self.instantiation == "dot_product":
            return affinity.dot_product_affinity(theta, phi)
        return affinity.concatenation_affinity(theta, phi, self.w_f)

    @torch.jit.unused
    def multiply_adds(self, *space: int) -> int:
        """Return the multiply-adds for one input of size ``space``, such as 50, 84.

        The count includes the convolutions, the products with w_f, and the operation as implemented
        in ``affinity.py``. As usual it excludes pooling, softmax, sorting, sums, and the norm.
        """
        c, d = self.in_channels, self.bottleneck_channels
        n = m = math.prod(space)
        if self.subsample != "none":
            m = math.prod(space[:-2]) * math.prod(math.ceil(side / 2) for side in space[-2:])
        source = m if self.subsample == "pool_conv" else n
        total = source * c * d + n * d * c  # g, W_z
        if self.instantiation == "gaussian":
            return total + n * m * (c + d)
        total += (n + source) * c * d  # theta, phi
        if self.instantiation == "embedded_gaussian":
            return total + 2 * n * m * d
        if self.instantiation == "disentangled":
            return total + 2 * n * m * d + source * c + m * d  # mask, its sum of g
        if self.instantiation == "dot_product":
            return total + min(2 * n * m, (n + m) * d) * d
        return total + 2 * (n + m) * d  # w_f; a_i and b_j times a row of D channels

    def extra_repr(self) -> str:
        unit_norm = "" if self.log_scale is None else ", unit_norm=True"
        return (
            f"{self.instantiation}, bottleneck_channels={self.bottleneck_channels}, "
            f"scale={self.scale:.4g}, subsample={self.subsample}{unit_norm}"
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return theta, phi and g of x, and the logits of the unary term, (B, M), or None."""
        source = _max_pool(x) if self.subsample == "pool_conv" else x
        theta, phi, g = self.theta(x), self.phi(source), self.g(source)
        if self.subsample == "conv_pool":
            phi, g = _max_pool(phi), _max_pool(g)
        theta, phi, g = _as_rows(theta), _as_rows(phi), _as_rows(g)
        log_scale = self.log_scale
        if log_scale is not None:
            # A length below 0.1 counts as 0.1. Otherwise the gradient would have no bound where x
            # is zero, as in the padding of images. With autocast, normalize() returns float32.
            unit_theta, unit_phi = F.normalize(theta, 2.0, 2, 0.1), F.normalize(phi, 2.0, 2, 0.1)
            theta = (unit_theta * log_scale.exp()).to(theta.dtype)
            return theta, unit_phi.to(phi.dtype), g, None
        if self.instantiation != "disentangled":
            return theta, phi, g, None
        mask = self.mask(source)
        if self.subsample == "conv_pool":
            mask = _max_pool(mask)
        theta, phi = theta - theta.mean(1, keepdim=True), phi - phi.mean(1, keepdim=True)
        return theta, phi, g, mask.flatten(1)


def _as_rows(embedding: Tensor) -> Tensor:
    """Reshape (B, D, *space) to (B, N, D)."""
    return embedding.flatten(2).transpose(1, 2)


def _max_pool(x: Tensor) -> Tensor:
    """Halve the size in space, not in time; ``ceil_mode`` allows a size of 1 and odd sizes."""
    if x.dim() == 3:
        return F.max_pool1d(x, kernel_size=2, ceil_mode=True)
    if x.dim() == 4:
        return F.max_pool2d(x, kernel_size=2, ceil_mode=True)
    return F.max_pool3d(x, kernel_size=[1, 2, 2], ceil_mode=True)


def find_block_class(name: str) -> type[CNNBlockBase]:
    """Return a class in NONLOCAL_BLOCK_REGISTRY; raise an OptionError if there is none."""
    if name not in NONLOCAL_BLOCK_REGISTRY:
        names = ", ".join(sorted(name for name, _ in NONLOCAL_BLOCK_REGISTRY))
        problem = f"{name!r} is not in NONLOCAL_BLOCK_REGISTRY; there are: {names}"
        raise OptionError("block", problem)
    return NONLOCAL_BLOCK_REGISTRY.get(name)


def named_blocks(model: nn.Module) -> dict[str, CNNBlockBase]:
    """Return name -> module for all modules of a class in NONLOCAL_BLOCK_REGISTRY."""
    classes = tuple(block_class for _, block_class in NONLOCAL_BLOCK_REGISTRY)
    return {name: m for name, m in model.named_modules() if isinstance(m, classes)}


def reduce_channels(in_channels: int, reduction: int) -> int:
    """Return ``in_channels // reduction``; raise an OptionError if there is a remainder."""
    if not isinstance(reduction, int) or reduction < 1 or in_channels % reduction:
        problem = f"must be positive and divide the {in_channels} channels of the input"
        raise OptionError("reduction", f"{reduction!r} {problem}")
    return in_channels // reduction


def _check_choice(name: str, choice: str, valid: tuple[str, ...]) -> None:
    if choice not in valid:
        raise OptionError(name, f"{choice!r} is unknown; valid: {', '.join(map(repr, valid))}")
