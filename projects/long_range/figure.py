#!/usr/bin/env python
"""Draw what attention and the global average make of one image of the data.

It needs the weights of two rows, which study.py writes into its output folder.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from long_range.measures import lock_attention
from long_range.recall import COLOURS
from long_range.rows import MAIN, MEAN, Row
from long_range.training import Images, build_net, load_images, predict
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle


def main(argv: Sequence[str] | None = None) -> None:
    rows = {row.name: row for row in MAIN if row.block == "NonLocalBlock"}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=rows, default="Gaussian")
    parser.add_argument("--image", type=int, default=0, help="index in the validation images")
    parser.add_argument("--weights", type=Path, default=Path("output/long_range"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("docs/images/recall.png"))
    args = parser.parse_args(argv)
    image = load_images(8, "val").select(slice(args.image, args.image + 1))
    draw(image, (rows[args.row], MEAN), args.weights).savefig(args.output, dpi=150)


def draw(image: Images, rows: Sequence[Row], weights: Path) -> Figure:
    """For each row, frame the locks in the predicted colours, and draw arrows if it has attention.

    An arrow goes from a lock to the position with the largest weight.
    """
    height, width = image.pixels.shape[2:]
    figure = Figure(figsize=(7, len(rows) * (7 * height / width + 0.3)), layout="constrained")
    for axes, row in zip(figure.subplots(len(rows)), rows):
        net, (block,) = build_net(replace(row, warm_up=0), 1)
        net.load_state_dict(torch.load(weights / f"{row.digest()}.pth"))
        predicted = predict(net, image)[1][0, row.keys :].argmax(dim=1)
        right = (predicted == image.colours[0, row.keys :]).sum()
        axes.set_title(f"{row.name}: {right} of {row.keys} locks are right", fontsize=9)
        axes.imshow(image.pixels[0].permute(1, 2, 0))
        axes.set_axis_off()
        _frame(axes, image.boxes[0, row.keys :].tolist(), predicted.tolist())
        if hasattr(block, "affinity_matrix"):
            targets = lock_attention(net, block, image)[1][0]
            for start, end in zip(image.centres()[0, row.keys :].tolist(), targets.tolist()):
                arrow = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color="w")
                axes.add_patch(arrow)
    return figure


def _frame(axes: Axes, boxes: list[list[float]], colours: list[int]) -> None:
    rgb = [[channel / 255 for channel in colour] for colour in COLOURS.values()]
    for (x0, y0, x1, y1), colour in zip(boxes, colours):
        side = {"width": x1 - x0 + 1, "height": y1 - y0 + 1}
        frame = Rectangle((x0 - 1, y0 - 1), **side, fill=False, edgecolor=rgb[colour], linewidth=3)
        axes.add_patch(frame)


if __name__ == "__main__":
    main()
