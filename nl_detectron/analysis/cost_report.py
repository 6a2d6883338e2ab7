"""The cost of blocks, :func:`analyze_cost`, as Markdown, CSV, JSON and a chart."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from ..layers import SUBSAMPLES
from .cost import BlockCost, ModelCost


def markdown(models: Sequence[ModelCost], blocks: Sequence[BlockCost]) -> str:
    """Two tables: the model without and with its blocks, and one block wherever it might be."""
    totals = [
        [
            f"{model.height}x{model.width}",
            f"{model.parameters:,}",
            f"{model.multiply_adds / 1e9:.2f}",
            model.blocks,
            f"{model.added_parameters:,}",
            f"{model.added_multiply_adds / 1e9:.2f}",
            f"{model.added_multiply_adds / model.multiply_adds:.2%}",
        ]
        for model in models
    ]
    rows = [
        [
            f"{block.height}x{block.width}",
            block.stage,
            block.channels,
            block.subsample,
            f"{block.positions:,}",
            f"{block.parameters:,}",
            f"{block.multiply_adds / 1e9:.2f}",
            f"{block.share:.2%}",
            f"{block.affinity_bytes / 2**20:,.1f}",
        ]
        for block in blocks
    ]
    added = ["blocks", "parameters added", "GMAC added", "of the model"]
    per_block = ["image", "stage", "channels", "sub-sampling", "positions", "parameters", "GMAC"]
    return "\n\n".join(
        [
            "The model without non-local blocks, and what the blocks of this config add:",
            _tabulate(totals, ["image", "parameters", "GMAC", *added]),
            "One block in a stage; MiB of the affinity matrix in float32, which is never built:",
            _tabulate(rows, [*per_block, "of the model", "affinity (MiB)"]),
        ]
    )


def write(
    models: Sequence[ModelCost], blocks: Sequence[BlockCost], tables: str, folder: Path
) -> list[Path]:
    """Write cost.csv (of the blocks), .json (of all), .png and .md (the tables) into a folder.

    Returns:
        The four files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"cost.{kind}" for kind in ("csv", "json", "png", "md")]
    records = {
        "models": [asdict(model) for model in models],
        "blocks": [asdict(block) for block in blocks],
    }
    with open(files[0], "w", newline="") as file:
        writer = csv.DictWriter(file, records["blocks"][0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records["blocks"])
    files[1].write_text(json.dumps(records, indent=1) + "\n")
    chart(blocks).savefig(files[2], dpi=100)
    files[3].write_text(f"{tables}\n", "utf-8")
    return files


def chart(blocks: Sequence[BlockCost]) -> Figure:
    """Multiply-adds and affinity size by stage, on logarithmic axes; a column per image size."""
    sizes = list(dict.fromkeys((block.height, block.width) for block in blocks))
    figure = Figure(figsize=(1.5 + 5 * len(sizes), 7), layout="constrained")
    axes = figure.subplots(2, len(sizes), squeeze=False, sharex=True, sharey="row")
    for (work, memory), size in zip(axes.T, sizes):
        here = [block for block in blocks if (block.height, block.width) == size]
        gmac = [block.multiply_adds / 1e9 for block in here]
        mib = [block.affinity_bytes / 2**20 for block in here]
        work.set_title(f"image {size[0]}x{size[1]}")
        _bars(work, here, gmac, [f"{block.share:.1%}" for block in here])
        _bars(memory, here, mib, [f"{value:,.1f}" for value in mib])
    axes[0, 0].set_ylabel("GMAC of one block, and its share of the model")
    axes[1, 0].set_ylabel("affinity matrix avoided, float32 (MiB)")
    axes[0, -1].legend(title="sub-sampling")
    return figure


def _bars(axes: Axes, blocks: list[BlockCost], values: list[float], labels: list[str]) -> None:
    """A group of bars for each stage, one bar for each sub-sampling."""
    stages = list(dict.fromkeys(block.stage for block in blocks))
    width = 0.8 / len(SUBSAMPLES)
    for i, subsample in enumerate(SUBSAMPLES):
        chosen = [j for j, block in enumerate(blocks) if block.subsample == subsample]
        places = [stage + (i - (len(SUBSAMPLES) - 1) / 2) * width for stage in range(len(stages))]
        bars = axes.bar(places, [values[j] for j in chosen], width, label=subsample)
        axes.bar_label(bars, [labels[j] for j in chosen], padding=2, fontsize=7, rotation=90)
    axes.set_yscale("log")
    axes.set_xticks(range(len(stages)), stages)
    axes.margins(y=0.25)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)


def _tabulate(rows: list[list], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
