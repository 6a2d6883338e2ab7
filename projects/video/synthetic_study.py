#!/usr/bin/env python
"""Train the rows of the synthetic task that results.jsonl does not have, and write the README.

For each seed, a C2D network learns to tell the four combinations of cue and event. From its weights
every row is trained on the exclusive or. An interrupted study is resumed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Optional

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from matplotlib.figure import Figure
from nl_video import load_config
from nl_video.attention import attention_row, draw_attention
from nl_video.synthetic import FIRST_EVENT, draw
from nl_video.weights import VideoCheckpointer
from tabulate import tabulate

from nl_detectron.config import config_hash
from nl_detectron.evaluation.runs import read_environment, read_metrics
from nl_detectron.modeling import build_model

PROJECT = Path(__file__).resolve().parent
RESULTS = PROJECT / "results.jsonl"
WARM_UP = "Synthetic_warm_up"
ROWS = {
    "Synthetic_C2D": "C2D",
    "Synthetic_C2D_NL": "+1 block, spacetime",
    "Synthetic_C2D_NL_space": "+1 block, space only",
    "Synthetic_C2D_NL_time": "+1 block, time only",
}
PANELS = {"train error": "training error (%)", "error": "validation error (%)"}


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report-only", action="store_true", help="do not train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one core each")
    parser.add_argument("--output", type=Path, default=Path("output/video"), metavar="DIR")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="for all runs")
    args = parser.parse_args(argv)
    if args.opts and args.results == RESULTS:
        parser.error("--opts needs --results, because other options give other results")

    results, failures = read_results(args.results), []
    if not args.report_only:
        for name in ("xor_train", "xor_val"):
            DatasetCatalog.get(f"nl_synthetic_video_{name}")  # generated once, not by every job
        todo = [(row, seed) for seed in args.seeds for row in ROWS if (row, seed) not in results]
        with ThreadPoolExecutor(args.jobs) as pool:
            for runs in ([(WARM_UP, seed) for seed in sorted({seed for _, seed in todo})], todo):
                lines = pool.map(lambda run: train(*run, args.output, args.opts), runs)
                for (row, seed), line in zip(runs, lines):
                    print(f"{row}, seed {seed}: {line and line['top1']}", flush=True)
                    if line is None:
                        failures.append(f"{args.output / row}/seed{seed}: see log.txt there")
                    elif row != WARM_UP or (row, seed) not in results:
                        with open(args.results, "a") as file:
                            file.write(json.dumps(line) + "\n")
        results = read_results(args.results)
    print(table(results))
    if args.results == RESULTS:
        plot(results, PROJECT / "curves.png")
        draw_example(args.output / "Synthetic_C2D_NL" / f"seed{args.seeds[0]}/model_final.pth")
        readme = PROJECT / "README.md"
        pattern = re.compile(r"(<!-- study -->).*?(<!-- end -->)", re.DOTALL)
        readme.write_text(
            pattern.sub(lambda m: f"{m[1]}\n\n{table(results)}\n\n{m[2]}", readme.read_text())
        )
    if failures:
        sys.exit("\n".join(["failed runs:", *failures]))


def train(row: str, seed: int, output: Path, opts: Sequence[str]) -> Optional[dict]:
    """Run train_net.py on one core, and return the line of the results; None if it fails."""
    config, folder = str(PROJECT / f"configs/{row}.yaml"), output / row / f"seed{seed}"
    run_opts = [*opts, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
    if row != WARM_UP:
        run_opts += ["MODEL.WEIGHTS", str(output / WARM_UP / f"seed{seed}/model_final.pth")]
    command = [sys.executable, str(PROJECT / "train_net.py"), "--resume", "--config-file", config]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run([*command, *run_opts], env=variables, capture_output=True, text=True)
    if process.returncode:
        print(process.stderr[-2000:], file=sys.stderr)
        return None
    metrics = read_metrics(folder)
    evaluated = [line for line in metrics if "video/top1" in line]
    logged = [line for line in metrics if "train_error" in line]
    environment = read_environment(folder)
    last = environment["iterations"]  # the evaluation after it has this number, not one less
    return {
        "row": row,
        "seed": seed,
        "top1": evaluated[-1]["video/top1"],
        "cross_entropy": round(evaluated[-1]["video/cross_entropy"], 4),
        "error": [
            [min(line["iteration"] + 1, last), 100 - line["video/top1"]] for line in evaluated
        ],
        "train error": [[line["iteration"] + 1, round(line["train_error"], 2)] for line in logged],
        "seconds": round(mean(line["time"] for line in logged), 4),
        "config": config_hash(load_config(config, opts)),
        "commit": environment["commit"],
    }


def read_results(path: Path) -> dict[tuple[str, int], dict]:
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return {(line["row"], line["seed"]): line for line in lines}


def table(results: dict[tuple[str, int], dict]) -> str:
    cells = []
    for row, name in {WARM_UP: "warm-up: all four combinations", **ROWS}.items():
        lines = [line for (other, _), line in sorted(results.items()) if other == row]
        if lines:
            columns = ("top1", ".1f"), ("cross_entropy", ".2f"), ("seconds", ".2f")
            means = [_mean((line[key] for line in lines), form) for key, form in columns]
            each = ", ".join(f"{line['top1']:.1f}" for line in lines)
            cells.append([name, means[0], each, *means[1:]])
    headers = ["", "top-1", "by seed", "cross-entropy", "s/iteration"]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def _mean(values: Iterable[float], form: str) -> str:
    values = list(values)
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def plot(results: dict[tuple[str, int], dict], path: Path) -> None:
    """Plot training and validation error as in Fig. 4: the mean over seeds, each seed thinly."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for (key, title), axes in zip(PANELS.items(), figure.subplots(1, 2, sharey=True)):
        for number, (row, name) in enumerate(ROWS.items()):
            curves = [np.array(line[key]) for (other, _), line in results.items() if other == row]
            for iterations, errors in (curve.T for curve in curves):
                axes.plot(iterations, errors, color=f"C{number}", linewidth=0.5, alpha=0.5)
            if curves:
                axes.plot(*np.mean(curves, axis=0).T, color=f"C{number}", label=name)
        axes.set(title=title, xlabel="iteration", ylim=(0, 80))
        axes.grid(color="0.9")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_example(weights: Path) -> None:
    """Draw the attention from a cue to the frames of the event, if the weights are there.

    Of 64 validation videos, it is the one with the largest sum of these weights.
    """
    if not weights.is_file():
        return
    model = build_model(load_config(str(PROJECT / "configs/Synthetic_C2D_NL.yaml"))).eval()
    VideoCheckpointer(model).load(str(weights))
    examples = []
    for i in range(64):
        frames, places = draw((1, i), *divmod(i % 4, 2))
        clip = torch.from_numpy(np.stack(frames[:32])).permute(3, 0, 1, 2)[None]
        query = (places["cue"][0] + 2, *places["cue"][1:])
        row, _ = attention_row(model, clip, "", query)
        if places["event"][0] == FIRST_EVENT[0]:  # its first frame is the one that is drawn
            examples.append((row[-1].sum().item(), clip, query))
    _, clip, query = max(examples, key=lambda example: example[0])
    draw_attention(model, clip, query=query).savefig(PROJECT / "attention.png", dpi=120)


if __name__ == "__main__":
    main()
