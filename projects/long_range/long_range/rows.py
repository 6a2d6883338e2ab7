"""The rows of the study, and its schedule."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

WARM_UP = 400  # iterations without a block, with SGD
ITERATIONS = 1000  # after the block is inserted
BATCH = 16
DECAY_AT = 0.8  # of the iterations: the learning rate is divided by 10
RAMP = 20  # iterations in which the learning rate rises linearly
CLIP = 1.0  # maximum norm of the gradient
OPTIMIZERS = {"SGD": (0.02, 1e-4), "ADAMW": (1e-3, 1e-2)}  # learning rate, weight decay


@dataclass(frozen=True)
class Row:
    """What one row of a table trains; the defaults are those of the main table."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)  # of the block
    block: str | None = "NonLocalBlock"  # a name in NONLOCAL_BLOCK_REGISTRY
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
        """Return 8 hexadecimal digits of a hash of what determines a run, except its seed."""
        schedule = WARM_UP, BATCH, DECAY_AT, RAMP, CLIP, OPTIMIZERS
        what = [asdict(replace(self, name="", seeds=0)), schedule]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


EMBEDDED = Row("embedded Gaussian")
MEAN = Row("mean", block="MeanBlock")
MAIN = [
    Row("R18", block=None),
    MEAN,
    Row("global context", {"reduction": 2}, "GlobalContextBlock"),
    EMBEDDED,
    Row("Gaussian", {"instantiation": "gaussian"}),
    Row("dot product", {"instantiation": "dot_product"}),
    Row("concatenation", {"instantiation": "concatenation"}),
    Row("disentangled", {"instantiation": "disentangled"}),
    Row("conv1x1", {"kernel_size": 1}, "ConvBlock"),
    Row("conv3x3", {"kernel_size": 3}, "ConvBlock"),
    Row("R50", block=None, depth=50),
]
RECIPE = [
    Row(
        f"{optimizer}, {start}, factor {factor}",
        optimizer=optimizer.upper(),
        lr_factor=float(factor),
        warm_up=warm_up,
        iterations=WARM_UP + ITERATIONS - warm_up,
    )
    for factor in (1, 3, 10)
    for start, warm_up in (("inserted", WARM_UP), ("from scratch", 0))
    for optimizer in ("SGD", "AdamW")
]
OPTIONS = [
    replace(EMBEDDED, name="default"),
    Row("no sub-sampling", {"subsample": "none"}),
    Row("conv_pool", {"subsample": "conv_pool"}),
    Row("unit norm", {"unit_norm": True}),
    Row("unit norm, no sub-sampling", {"unit_norm": True, "subsample": "none"}),
    Row("disentangled, temperature 0.05", {"instantiation": "disentangled", "temperature": 0.05}),
    Row("BN", {"norm": "BN"}),
    Row("GN", {"norm": "GN"}),
    Row("2 blocks", location=("res4.0", "res4.1")),
    Row("glyphs of keys only", lock_glyphs=False),
]
LONG = [replace(row, name=f"{row.name}, 3x", iterations=3 * ITERATIONS) for row in (MEAN, EMBEDDED)]
WIDTHS = [
    replace(row, name=f"{row.name}, K = {keys}, D = {width}", keys=keys, seeds=3)
    for row in (MEAN, EMBEDDED)
    for keys in (2, 4, 8)
    for width in (4, 8, 16, 32)
    for row in [replace(row, options={"bottleneck_channels": width})]
]
# In the order of their importance, in which they are run.
TABLES = {"main": MAIN, "long": LONG, "options": OPTIONS, "recipe": RECIPE, "widths": WIDTHS}
