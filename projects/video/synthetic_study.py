#!/usr/bin/env python
"""Train the rows of the synthetic task, and write the table and the pictures of the README.

For each seed, a C2D network learns to tell the four combinations of cue and event. From its weights
every row is trained on the exclusive or. Finished runs are kept, an interrupted one is resumed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from nl_video import synthetic
from tabulate import tabulate
from tqdm import tqdm

from nl_detectron.evaluation.runs import read_environment, read_metrics
from nl_detectron.visualization.curves import plot_curves

PROJECT = Path(__file__).resolve().parent
WARM_UP = "Synthetic_warm_up"
ROWS = {
    WARM_UP: "warm-up: all four combinations",
    "Synthetic_C2D": "C2D",
    "Synthetic_C2D_NL": "+1 block, spacetime",
    "Synthetic_C2D_NL_5_blocks": "+5 blocks, spacetime",
    "Synthetic_C2D_NL_space": "+1 block, space only",
    "Synthetic_C2D_NL_time": "+1 block, time only",
}
PANELS = {"train_error": "training error (%)", "video/error": "validation error (%)"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one core each")
    parser.add_argument("--output", type=Path, default=Path("output/video"), metavar="DIR")
    parser.add_argument("--report", type=Path, default=PROJECT, metavar="DIR", help="has README.md")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="for tests")
    args = parser.parse_args(argv)
    for split in synthetic.SPLITS:
        synthetic.load(split, "xor")  # generate it once, not in every run
    results = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for rows in ([WARM_UP], [row for row in ROWS if row != WARM_UP]):
            runs = [(row, seed, args.output, args.opts) for seed in args.seeds for row in rows]
            results += tqdm(pool.map(lambda run: train(*run), runs), rows[-1], len(runs))
    with open(args.report / "results.jsonl", "w") as file:
        file.writelines(json.dumps(result) + "\n" for result in results)
    readme, pattern = args.report / "README.md", r"(?s)(<!-- study -->\n\n).*?(\n\n!\[Errors)"
    readme.write_text(re.sub(pattern, rf"\1{table(results)}\2", readme.read_text()))
    plot(results, args.report / "curves.png")
    of_block = [result for result in results if result["row"] == "Synthetic_C2D_NL"]
    best = min(of_block, key=lambda result: result["video/cross_entropy"][-1][1])
    draw_example(args.output / f"Synthetic_C2D_NL/seed{best['seed']}", args.report)


def train(row: str, seed: int, output: Path, opts: Sequence[str]) -> dict:
    """Train a row, unless it is finished, and return the curves of its metrics."""
    folder, start = output / row / f"seed{seed}", output / WARM_UP / f"seed{seed}/model_final.pth"
    if not read_curves(folder):
        options = [*opts, "SEED", seed, "OUTPUT_DIR", folder]
        options += [] if row == WARM_UP else ["MODEL.WEIGHTS", start]
        config_file = PROJECT / f"configs/{row}.yaml"
        run_script("train_net.py", "--resume", "--config-file", config_file, *options)
    return {"row": row, "seed": seed, **read_curves(folder)}


def run_script(name: str, *arguments) -> None:
    command = [str(part) for part in (sys.executable, "-W", "ignore", PROJECT / name, *arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)


def read_curves(folder: Path) -> dict[str, list] | None:
    """Return (iteration, value) of each metric, or None if the run is not finished."""
    lines, last = read_metrics(folder), read_environment(folder).get("iterations", 0) - 1
    if not any("video/error" in line and line["iteration"] >= last for line in lines):
        return None
    return {
        key: [(line["iteration"], round(line[key], 4)) for line in lines if key in line]
        for key in (*PANELS, "video/cross_entropy")
    }


def table(results: Sequence[dict]) -> str:
    cells = []
    for row, name in ROWS.items():
        of_row = [result for result in results if result["row"] == row]
        top1 = [100 - result["video/error"][-1][1] for result in of_row]
        entropy = [result["video/cross_entropy"][-1][1] for result in of_row]
        each = ", ".join(f"{value:.1f}" for value in top1)
        cells.append([name, f"{np.mean(top1):.1f}", each, f"{np.mean(entropy):.2f}"])
    headers = ["", "top-1", "by seed", "cross-entropy"]
    return tabulate(cells, headers, "github", disable_numparse=True)


def plot(results: Sequence[dict], path: Path) -> None:
    """Plot training and validation error as in Fig. 4."""
    groups = {}
    for row, name in list(ROWS.items())[1:]:
        runs = [result for result in results if result["row"] == row]
        groups[name] = {key: [dict(run[key]) for run in runs] for key in PANELS}
    plot_curves(groups, path, PANELS)


def draw_example(run: Path, report: Path) -> None:
    """Draw what the block attends to, asked at the cue of the first validation video."""
    video = synthetic.load("val", "xor")[0]["file_name"]
    cue = synthetic.draw((1, 0), 0, 0)[1]["cue"]
    options = ["--config-file", PROJECT / "configs/Synthetic_C2D_NL.yaml", "--query", *cue]
    options += ["--weights", run / "model_final.pth", "--figure", report / "attention.png"]
    run_script("predict.py", video, *options)


if __name__ == "__main__":
    main()
