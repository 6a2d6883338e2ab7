#!/usr/bin/env python3
"""Plot the training and validation curves of several runs from their metrics.json.

Runs whose configs differ in the seed alone are thin lines of one colour, with their mean.

example:
  tools/plot_curves.py output/demo/Synthetic/*/seed* --output curves.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nl_detectron.errors import exit_on_user_error
from nl_detectron.visualization.curves import plot_curves, read_curves


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output folder of train_net.py")
    add("--output", type=Path, default=Path("curves.png"), metavar="FILE", help="png, svg or pdf")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".pdf", ".png", ".svg"):
        parser.error(f"--output {args.output}: must end in .png, .svg or .pdf")
    with exit_on_user_error():
        plot_curves(read_curves(args.runs), args.output)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
