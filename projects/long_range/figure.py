#!/usr/bin/env python
"""Draw the predictions for an image, and the strongest positions, by networks of study.py."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from long_range.measures import lock_attention
from long_range.recall import COLOURS
from long_range.rows import ROWS, Row
from long_range.training import Images, build_net, load_images, predict
from PIL import Image

# isort: split
# After long_range, which silences a warning of torch that importing detectron2 causes.
from detectron2.utils.visualizer import Visualizer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["embedded Gaussian", "mean"])
    parser.add_argument("--image", type=int, default=0, help="index in the validation images")
    parser.add_argument("--weights", type=Path, default=Path("output/long_range"), metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    image = load_images(8, "val").select(slice(args.image, args.image + 1))
    pictures = [draw(image, ROWS[name], args.weights) for name in args.rows]
    Image.fromarray(np.concatenate(pictures)).save(args.output)


def draw(image: Images, row: Row, weights: Path) -> np.ndarray:
    """Frame each lock in the predicted colour, and draw an arrow to its strongest position."""
    net, (block,) = build_net(replace(row, warm_up=0), 1)
    net.load_state_dict(torch.load(weights / f"{row.digest()}.pth", map_location="cpu"))
    predicted = predict(net, image)[1][0, row.keys :].argmax(dim=1).tolist()
    visualizer = Visualizer(image.pixels[0].permute(1, 2, 0), scale=2.5)
    colours = np.array(list(COLOURS.values())) / 255
    for box, colour in zip(image.boxes[0, row.keys :], predicted):
        visualizer.draw_box(box, alpha=1, edge_color=colours[colour])
    if hasattr(block, "affinity_matrix"):
        targets = lock_attention(net, block, image)[1][0]
        for start, end in zip(image.centres()[0, row.keys :], targets):
            style = {"arrowstyle": "-|>", "color": "white", "shrinkA": 0, "shrinkB": 0}
            visualizer.output.ax.annotate("", xy=end, xytext=start, arrowprops=style)
    return visualizer.output.get_image()


if __name__ == "__main__":
    main()
