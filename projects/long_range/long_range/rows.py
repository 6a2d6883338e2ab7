"""The rows of the study, and its schedule."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

WARM_UP = 400  # iterations without a block, with SGD
ITERATIONS = 500  # after the block is inserted
BATCH = 16
DECAY_AT = 0.8  # of the iterations: the learning rate is divided by 10
RAMP = 20  # iterations in which the learning rate rises linearly
CLIP = 1.0  # maximum norm of the gradient
OPTIMIZERS = {"SGD": (0.02, 1e-4), "ADAMW": (1e-3, 1e-2)}  # learning rate, weight decay


@dataclass(frozen=True)
class Row:
    """What one row of a table trains; the defaults are the schedule of the main table."""

    name: str
    block: str | None = "NonLocalBlock"  # a name in NONLOCAL_BLOCK_REGISTRY
    options: dict[str, Any] = field(default_factory=dict)  # of the block
    location: tuple[str, ...] = ("res4.-2",)
    depth: int = 18
    keys: int = 8
    optimizer: str = "ADAMW"
    lr_factor: float = 1.0  # of the block
    warm_up: int = WARM_UP  # 0: the block is inserted into a new network
    iterations: int = ITERATIONS
    lock_glyphs: bool = True  # supervise the glyphs of locks, and not only those of keys
    seeds: int = 5

    def digest(self) -> str:
        """Return 8 hexadecimal digits of a hash of what determines a run."""
        what = {**asdict(self), "name": "", "seeds": 0}
        what["schedule"] = (BATCH, DECAY_AT, RAMP, CLIP, OPTIMIZERS)
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


EMBEDDED = Row("embedded Gaussian")
MAIN = [
    Row("R18", block=None),
    Row("mean", block="MeanBlock"),
    Row("global context", block="GlobalContextBlock"),
    EMBEDDED,
    Row("Gaussian", options={"instantiation": "gaussian"}),
    Row("dot product", options={"instantiation": "dot_product"}),
    Row("concatenation", options={"instantiation": "concatenation"}),
    Row("disentangled", options={"instantiation": "disentangled"}),
    Row("conv1x1", block="ConvBlock", options={"kernel_size": 1}),
    Row("conv3x3", block="ConvBlock", options={"kernel_size": 3}),
    Row("R50", block=None, depth=50),
]

_STARTS = {"inserted": {}, "from scratch": {"warm_up": 0, "iterations": WARM_UP + ITERATIONS}}
RECIPE = [
    replace(
        EMBEDDED,
        name=f"{optimizer}, factor {factor}, {start}",
        **options,
        optimizer=optimizer.upper(),
        lr_factor=float(factor),
    )
    for start, options in _STARTS.items()
    for optimizer in ("SGD", "AdamW")
    for factor in (1, 3, 10)
]

OPTIONS = [
    replace(EMBEDDED, name="no sub-sampling", options={"subsample": "none"}),
    replace(EMBEDDED, name="conv_pool", options={"subsample": "conv_pool"}),
    replace(EMBEDDED, name="unit norm", options={"unit_norm": True}),
    replace(
        EMBEDDED,
        name="unit norm, no sub-sampling",
        options={"unit_norm": True, "subsample": "none"},
    ),
    replace(EMBEDDED, name="BN", options={"norm": "BN"}),
    replace(EMBEDDED, name="GN", options={"norm": "GN"}),
    replace(EMBEDDED, name="2 blocks", location=("res4.0", "res4.1")),
    replace(EMBEDDED, name="glyphs of keys only", lock_glyphs=False),
]
LONG = [
    replace(row, name=f"{row.name}, 3x", iterations=3 * ITERATIONS)
    for row in MAIN
    if row.name in ("mean", "embedded Gaussian")
]
WIDTHS = [
    replace(
        row,
        name=f"{row.name}, K = {keys}, D = {width}",
        keys=keys,
        seeds=3,
        options={"bottleneck_channels": width},
    )
    for keys in (2, 4, 8)
    for width in (4, 8, 16, 32)
    for row in MAIN
    if row.name in ("mean", "embedded Gaussian")
]
TABLES = {"main": MAIN, "recipe": RECIPE, "options": OPTIONS, "long": LONG, "widths": WIDTHS}
