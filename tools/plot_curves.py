#!/usr/bin/env python3
"""Plot training and validation curves of several runs from their metrics.json.

Runs that share a config, whatever their seeds, are one line: their mean, at the iterations for
which all of them have a value, in a band of one standard deviation to either side.

example:
  tools/plot_curves.py output/demo/Synthetic/*/seed* --output curves.png
"""

import argparse
from pathlib import Path

from nl_detectron.errors import as_user_error, exit_on_user_error
from nl_detectron.visualization.curves import WINDOW, plot, read_groups


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output folders of train_net.py"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("curves.png"), metavar="FILE", help="to write"
    )
    parser.add_argument(
        "--window",
        type=int,
        default=WINDOW,
        metavar="N",
        help="draw the loss as the mean of N values of metrics.json (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.window < 1:
        parser.error(f"--window {args.window}: takes 1 or more")
    if args.output.suffix not in (".pdf", ".png", ".svg"):
        parser.error(f"--output {args.output}: has to end in .png, .svg or .pdf")

    with exit_on_user_error(), as_user_error(OSError), as_user_error(ValueError):
        groups = read_groups(args.runs, args.window)
        plot(groups, args.output, args.window)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
