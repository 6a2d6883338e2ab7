"""The rows of the study, which rows.yaml lists, and its schedule."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

WARM_UP = 400  # iterations without a block, with SGD
BATCH = 16
DECAY_AT = 0.8  # of the iterations: the learning rate is divided by 10
RAMP = 20  # iterations in which the learning rate rises linearly
CLIP = 1.0  # maximum norm of the gradient
OPTIMIZERS = {"SGD": (0.02, 1e-4), "ADAMW": (1e-3, 1e-2)}  # learning rate, weight decay


@dataclass(frozen=True)
class Row:
    """The training that one row of a table describes; the defaults are those of the main table."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)  # of the block
    block: str | None = "NonLocalBlock"  # a name in NONLOCAL_BLOCK_REGISTRY
    location: tuple[str, ...] = ("res4.-2",)
    depth: int = 18
    keys: int = 8
    optimizer: str = "ADAMW"
    lr_factor: float = 1.0  # of the block
    warm_up: int = WARM_UP  # 0: the block is inserted into a new network
    iterations: int = 1000
    lock_glyphs: bool = True  # supervise the glyphs of locks, and not only those of keys
    seeds: int = 5

    def digest(self) -> str:
        """Return 8 hexadecimal digits of a hash of what determines a run, except its seed."""
        schedule = WARM_UP, BATCH, DECAY_AT, RAMP, CLIP, OPTIMIZERS
        what = [asdict(replace(self, name="", seeds=0)), schedule]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


_TEXT = (Path(__file__).parents[1] / "rows.yaml").read_text()
TABLES = {table: [Row(**row) for row in rows] for table, rows in yaml.safe_load(_TEXT).items()}
ROWS = {row.name: row for rows in TABLES.values() for row in rows}
