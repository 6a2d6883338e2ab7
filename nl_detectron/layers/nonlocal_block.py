"""The non-local block of Wang et al., CVPR 2018, Sec. 3.3 (https://arxiv.org/abs/1711.07971)."""

import math
from typing import Any, Optional

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from torch import Tensor, nn

from ..errors import OptionError
from . import affinity

INSTANTIATIONS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
SUBSAMPLES = ("none", "conv_pool", "pool_conv")
NORMS = ("", "BN", "SyncBN", "GN")


class NonLocalBlock(CNNBlockBase):
    """``z = W_z y + x`` (Eq. 6), where y is the non-local operation on x (Eq. 1).

    Takes and returns (B, C, L), (B, C, H, W) or (B, C, T, H, W): every convolution in it is 1x1, so
    space and time are one axis of N positions, and the weights are the same for all three. A new
    block is the identity, so it can be put into a trained model without changing its output.

    Attributes:
        theta, phi, g (nn.Module): the paper's embeddings, C -> D channels; ``theta`` and ``phi`` do
            nothing in the Gaussian instantiation.
        out (Conv2d): the paper's W_z, D -> C channels, and the norm after it.
        w_f (nn.Parameter or None): (2 D), the weights of Eq. 5; concatenation only.
        bottleneck_channels (int): D.
    """

    # Of the names in a state dict. Who renames one adds 1, and renames it in what is of before.
    _version = 1

    def __init__(
        self,
        in_channels: int,
        *,
        instantiation: str = "embedded_gaussian",
        scale: bool = True,
        reduction: int = 2,
        bottleneck_channels: Optional[int] = None,
        subsample: str = "pool_conv",
        norm: str = "",
    ):
        """
        Args:
            in_channels: C, channels of input and output.
            instantiation: the pairwise function of Sec. 3.2: "gaussian", "embedded_gaussian",
                "dot_product" or "concatenation".
            scale: divide the inner product inside the softmax by the square root of its length, as
                the authors' released code does; False is the paper's Eq. 2 and 3. The other two
                instantiations have no softmax and ignore it.
            reduction: D = C // reduction; the paper's is 2.
            bottleneck_channels: D itself; overrides ``reduction``.
            subsample: 2x2 max pooling of phi and g (Sec. 3.3). "conv_pool" pools after them, as the
                paper says; "pool_conv" before them, as the released code does, which is another
                function and cheaper; "none" does not pool. (B, C, T, H, W) is pooled in H and W
                only. Odd sides are rounded up, so no position is dropped.
            norm: "", "BN", "SyncBN" or "GN", after W_z, its scale starting at zero (Sec. 4.1).
                Without one, W_z itself starts at zero. FrozenBN is refused: its scale is not
                learned, so the block would stay the identity for ever.

        Raises:
            ValueError: an option has a value that is not listed here.
        """
        super().__init__(in_channels, in_channels, stride=1)
        _check_choice("instantiation", instantiation, INSTANTIATIONS)
        _check_choice("subsample", subsample, SUBSAMPLES)
        if norm == "FrozenBN":
            raise OptionError(
                "norm",
                "'FrozenBN' cannot be learned: with its scale at zero the block would stay "
                f"the identity for ever; valid: {', '.join(map(repr, NORMS))}",
            )
        _check_choice("norm", norm, NORMS)
        if bottleneck_channels is None:
            if reduction < 1 or in_channels % reduction:
                raise OptionError(
                    "reduction",
                    f"{reduction} must be positive and divide the {in_channels} channels",
                )
            bottleneck_channels = in_channels // reduction
        if not 1 <= bottleneck_channels <= in_channels:
            raise OptionError(
                "bottleneck_channels",
                f"{bottleneck_channels} must be from 1 to {in_channels}, the channels of the input",
            )
        if norm == "GN" and in_channels % 32:
            raise OptionError(
                "norm", f"'GN' has 32 groups, which do not divide {in_channels} channels"
            )

        self.instantiation = instantiation
        self.subsample = subsample
        self.bottleneck_channels = bottleneck_channels
        embed = instantiation != "gaussian"
        inner_product = bottleneck_channels if embed else in_channels
        self.scale = inner_product**-0.5 if scale else 1.0

        self.theta = Conv2d(in_channels, bottleneck_channels, 1) if embed else nn.Identity()
        self.phi = Conv2d(in_channels, bottleneck_channels, 1) if embed else nn.Identity()
        self.g = Conv2d(in_channels, bottleneck_channels, 1)
        self.out = Conv2d(
            bottleneck_channels, in_channels, 1, bias=not norm, norm=get_norm(norm, in_channels)
        )
        self.register_parameter("w_f", None)
        if instantiation == "concatenation":
            self.w_f = nn.Parameter(torch.empty(2 * bottleneck_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation, as in the paper, and the zero that makes the block the identity."""
        for layer in (self.theta, self.phi, self.g, self.out):
            if isinstance(layer, nn.Conv2d):
                weight_init.c2_msra_fill(layer)
        if self.w_f is not None:
            nn.init.normal_(self.w_f, std=math.sqrt(2 / self.w_f.numel()))
        if self.out.norm is None:
            nn.init.zeros_(self.out.weight)
        else:
            nn.init.zeros_(self.out.norm.weight)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        version = local_metadata.get("version", self._version)
        if version > self._version:
            error_msgs.append(
                f"{prefix[:-1]} was saved by a later nl_detectron (version {version} of the "
                f"block, here it is {self._version}): install that, or a later one"
            )
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *space) -> the same shape."""
        theta, phi = self.embeddings(x)
        y = self.aggregate(theta, phi, self.values(x))
        return x + self.out(y.transpose(1, 2).unsqueeze(3)).reshape(x.shape)

    def embeddings(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """theta (B, N, D) and phi (B, M, D) of x; M = N without sub-sampling."""
        theta = self.theta(_flatten_space(x))
        if self.subsample == "pool_conv":
            phi = self.phi(_flatten_space(_max_pool(x)))
        else:
            phi = self._pool_embedding(self.phi(_flatten_space(x)), x)
        return _as_rows(theta), _as_rows(phi)

    def values(self, x: Tensor) -> Tensor:
        """g (B, M, D) of x."""
        if self.subsample == "pool_conv":
            return _as_rows(self.g(_flatten_space(_max_pool(x))))
        return _as_rows(self._pool_embedding(self.g(_flatten_space(x)), x))

    def aggregate(self, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """y (B, N, D) of Eq. 1, computed in the type of its inputs.

        Autocast ends here: it has made the embeddings what it wants, and two of the instantiations
        need float32 whatever they get.
        """
        if not torch.jit.is_scripting():
            kind = theta.device.type
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return self._aggregate(theta, phi, g)
        return self._aggregate(theta, phi, g)

    def _aggregate(self, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        if self.instantiation == "gaussian":
            return affinity.gaussian(theta, phi, g, self.scale)
        if self.instantiation == "embedded_gaussian":
            return affinity.embedded_gaussian(theta, phi, g, self.scale)
        w_f = self.w_f
        if w_f is None:
            return affinity.dot_product(theta, phi, g)
        return affinity.concatenation(theta, phi, g, w_f)

    @torch.jit.unused
    def affinity_matrix(self, x: Tensor) -> Tensor:
        """The weights f / C(x) of Eq. 1, (B, N, M), for looking at; memory grows with N times M."""
        theta, phi = self.embeddings(x)
        if self.instantiation == "gaussian":
            return affinity.gaussian_affinity(theta, phi, self.scale)
        if self.instantiation == "embedded_gaussian":
            return affinity.embedded_gaussian_affinity(theta, phi, self.scale)
        if self.instantiation == "dot_product":
            return affinity.dot_product_affinity(theta, phi)
        return affinity.concatenation_affinity(theta, phi, self.w_f)

    @torch.jit.unused
    def multiply_adds(self, *space: int) -> int:
        """Multiply-adds of one forward pass on one input of that size, such as (50, 84).

        Counted: the convolutions, the products with w_f, and the operation in the form that is
        used here: for Eq. 2, N x M products of C and of D; for Eq. 3, two of D; for Eq. 4, N + M
        of D x D or, on small maps, those of Eq. 3. Not counted, as is usual: pooling, softmax,
        sorting, sums, and the norm.
        """
        c, d = self.in_channels, self.bottleneck_channels
        n = m = math.prod(space)
        if self.subsample != "none":
            pooled = space if len(space) < 3 else space[1:]
            m = math.prod(space[: len(space) - len(pooled)])
            m *= math.prod(math.ceil(side / 2) for side in pooled)
        source = m if self.subsample == "pool_conv" else n
        total = source * c * d + n * d * c  # g, W_z
        if self.instantiation != "gaussian":
            total += (n + source) * c * d  # theta, phi
        if self.instantiation == "gaussian":
            return total + n * m * (c + d)
        if self.instantiation == "embedded_gaussian":
            return total + 2 * n * m * d
        if self.instantiation == "dot_product":
            return total + min(2 * n * m, (n + m) * d) * d
        return total + 2 * (n + m) * d  # w_f, then a_i and b_j times a row of width D each

    def extra_repr(self) -> str:
        return (
            f"{self.instantiation}, bottleneck_channels={self.bottleneck_channels}, "
            f"scale={self.scale:.4g}, subsample={self.subsample}"
        )

    def _pool_embedding(self, embedding: Tensor, x: Tensor) -> Tensor:
        if self.subsample == "none":
            return embedding
        size = list(x.shape)
        size[1] = embedding.shape[1]
        return _flatten_space(_max_pool(embedding.reshape(size)))


def _flatten_space(x: Tensor) -> Tensor:
    """(B, C, *space) -> (B, C, N, 1), a view when x is contiguous: what a 1x1 Conv2d takes."""
    return x.flatten(2).unsqueeze(3)


def _as_rows(embedding: Tensor) -> Tensor:
    """(B, D, N, 1) -> (B, N, D)."""
    return embedding.squeeze(3).transpose(1, 2)


def _max_pool(x: Tensor) -> Tensor:
    """Halves every side of space, not time; ``ceil_mode`` keeps odd sides whole and 1 legal."""
    if x.dim() == 3:
        return F.max_pool1d(x, kernel_size=2, ceil_mode=True)
    if x.dim() == 4:
        return F.max_pool2d(x, kernel_size=2, ceil_mode=True)
    return F.max_pool3d(x, kernel_size=[1, 2, 2], ceil_mode=True)


def _check_choice(name: str, value: str, choices: tuple) -> None:
    if value not in choices:
        raise OptionError(name, f"{value!r} is unknown; valid: {', '.join(map(repr, choices))}")
