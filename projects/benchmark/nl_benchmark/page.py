"""docs/PERFORMANCE.md, from the records in a folder."""

from pathlib import Path
from typing import List

from .model import PLACES
from .ratio import MAX_SPREAD, MIN_ROUNDS
from .record import Record, load
from .table import markdown_table

DEVICES = {"cpu": "CPU", "cuda": "GPU"}
MAX_BATCH = 16  # images: what detectron2 trains with by default
BENCHES = {
    "op": (
        "The operation alone",
        "theta, phi and g are given. The reference is the N x M matrix, times g; the "
        "concatenation's matrix is a broadcast sum of two vectors, not of N x M pairs of rows.",
    ),
    "block": (
        "The block",
        "1x1 convolutions, operation, W_z and sum, with the same weights in every competitor. "
        "The reference is this package's block with the N x M matrix.",
    ),
    "model": (
        "The whole model",
        "Mask R-CNN on random images. All rows of a model share the baseline's weights and find "
        "the same boxes, since a new block is the identity: 1,000 proposals and 100 masks in "
        "inference; a training step ends with SGD with momentum. GMAC are of one image's "
        "inference. Not measured: data loading, and the scaling of the loss with float16.",
    ),
}
READING = f"""
Times are medians over rounds, with the quartiles in parentheses. In each round the competitors of
a comparison run in turn, in one process, after a warm-up. A ratio of times is the median of the
rounds' ratios to the reference. Where its quartiles lie on both sides of 1 it says "no difference",
and it is refused below {MIN_ROUNDS} rounds, or if its interquartile range is more than
{MAX_SPREAD:.0%} of it.

Memory is counted in tensors: by torch's allocator on a GPU, from the profiler's record of every
allocation on a CPU, where scratch memory of the BLAS and oneDNN is not seen. "peak" contains what
stood before the call. In "forward" no gradients are wanted.

Before anything is timed, the outputs and input gradients of the competitors are compared in
float64 on a small input, within 1e-9. "difference" is the one at the size and in the precision of
the row: the largest, over the largest value of the reference.
""".strip()


def performance_page(folder: Path, command: str) -> str:
    """All records of a folder as one page; what there is no record of is said to be not run.

    Args:
        folder: beside which the page will stand, for the links to its plots; what
            tools/analyze_cost.py wrote is in folders in it.
        command: that writes the page.

    Raises:
        ValueError: a .json file in the folder is not a record.
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    records = {path: load(path) for path in sorted(folder.glob("*.json"))}
    parts = ["# Performance", f"Written by `{command}`.", READING]
    for bench, (title, about) in BENCHES.items():
        parts += [f"## {title}", about]
        for device, device_name in DEVICES.items():
            found = {p: r for p, r in records.items() if (r.bench, r.device) == (bench, device)}
            for path, record in found.items():
                parts += _section(path, record)
            parts += _missing(bench, device_name, list(found.values()))
    parts += ["## Multiply-adds", "Counted, not measured, by `tools/analyze_cost.py`."]
    costs = sorted(folder.glob("*/cost.md"))
    for path in costs:
        picture = path.with_suffix(".png").relative_to(folder.parent)
        parts += [path.read_text("utf-8").strip(), f"![The second table as a chart]({picture})"]
    if not costs:
        parts.append("Not run.")
    return "\n\n".join(parts) + "\n"


def _section(path: Path, record: Record) -> List[str]:
    machine = ", ".join(f"{key} {value}" for key, value in record.machine.items())
    versions = ", ".join(f"{key} {value}" for key, value in record.versions.items())
    parts = [
        f"### {path.stem.replace('_', ' ')}",
        f"Written by `{record.command}`: {record.dtype}, {record.rounds} rounds.",
        f"Machine: {machine}. Versions: {versions}.",
        markdown_table(record),
    ]
    picture = path.with_suffix(".png")
    if picture.exists():
        link = f"{path.parent.name}/{picture.name}"
        parts.append(f"![Time and memory of forward and backward pass against N]({link})")
    return parts


def _missing(bench: str, device: str, records: List[Record]) -> List[str]:
    if not records:
        return [f"{device}: not run."]
    if bench != "model":
        return []
    rows = [row for record in records for rows in record.comparisons for row in rows]
    missing = []
    for model, places in PLACES.items():
        found = [row for row in rows if row.facts["model"] == model]
        measured = {row.competitor.split()[0] for row in found}  # such as "+1 NL, pool_conv"
        counts = [f"+{count}" for count in places if f"+{count}" not in measured]
        if counts:
            missing.append(f"{model} {', '.join(counts)} NL")
        batch = max((row.facts["batch"] for row in found), default=0)
        if 0 < batch < MAX_BATCH:
            missing.append(f"{model} batches above {batch}")
    return [f"{device}, not run: {'; '.join(missing)}."] if missing else []
