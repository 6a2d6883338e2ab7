#!/usr/bin/env python3
"""Reproduce the paper's detection tables: plan, run, report.

examples:
  tools/reproduce.py plan table5 --num-gpus 8 --tflops 40
  tools/reproduce.py run table5 --rows R_50_FPN_noaug_1x R_50_FPN_NL_noaug_1x --num-gpus 8
  tools/reproduce.py report table5 table6 --format markdown
  tools/reproduce.py synthetic

"run" can be stopped at any moment and called again: it skips what is finished and goes on with
what was begun. A run that fails does not stop the others. "synthetic" does the same with the study
on the harder synthetic data, keeps a record of every run in docs/results/synthetic, and writes
docs/RESULTS.md from the records; called twice at once, the two share the work.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch
from nl_detectron.evaluation.plan import plan_table

from nl_detectron import study
from nl_detectron.errors import as_user_error, exit_on_user_error
from nl_detectron.evaluation import TABLES
from nl_detectron.evaluation.report import as_csv, as_json, markdown, report
from nl_detectron.evaluation.runner import Settings, dataset_opts, jobs, run_jobs

DOCS = Path(__file__).resolve().parents[1] / "docs"


def positive(text: str) -> int:
    """
    Raises:
        argparse.ArgumentTypeError: it is not a whole number of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = main.add_subparsers(dest="action", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("tables", nargs="+", choices=list(TABLES), metavar="TABLE")
    common.add_argument("--output", type=Path, default=Path("output/reproduce"), metavar="DIR")
    common.add_argument(
        "--seeds", type=positive, default=3, help="runs per row (default: %(default)s)"
    )
    common.add_argument(
        "--num-gpus", type=positive, default=1, help="per run (default: %(default)s)"
    )
    common.add_argument("--datasets", nargs=2, metavar=("TRAIN", "TEST"), help="in place of COCO")
    common.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="for all rows")

    of_study = actions.add_parser("synthetic")
    of_study.add_argument("--output", type=Path, default=Path("output/study"), metavar="DIR")
    of_study.add_argument(
        "--seeds",
        type=positive,
        default=default_seeds(),
        help="runs per row (default: %(default)s)",
    )
    of_study.add_argument(
        "--records", type=Path, default=DOCS / "results/synthetic", metavar="DIR", help="of runs"
    )
    of_study.add_argument(
        "--page", type=Path, default=DOCS / "RESULTS.md", metavar="FILE", help="to write"
    )
    of_study.add_argument(
        "--no-training", action="store_true", help="write the page from the records alone"
    )
    of_study.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="default: all")
    of_study.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="for all rows")

    for action in ("plan", "run"):
        sub = actions.add_parser(action, parents=[common])
        sub.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="default: all")
        if action == "plan":
            sub.add_argument("--tflops", type=float, help="what a GPU sustains; default: measured")
    sub = actions.add_parser("report", parents=[common])
    sub.add_argument("--format", choices=["markdown", "csv", "json"], default="markdown")
    return main


def main() -> int:
    args = parser().parse_args()
    with exit_on_user_error():
        if args.action == "synthetic":
            return synthetic(args)
        opts = [*(dataset_opts(*args.datasets) if args.datasets else []), *args.opts]
        settings = Settings(args.output, args.seeds, args.num_gpus, opts)
        if args.action == "report":
            print_report(args, settings)
            return 0
        todo = [job for table in args.tables for job in jobs(TABLES[table], args.rows, settings)]
        if args.action == "plan":
            print(plan_table(todo, settings, args.tflops))
            return 0
        failures = run_jobs(todo, settings)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def default_seeds() -> int:
    return 5 if torch.cuda.is_available() else 3


def synthetic(args: argparse.Namespace) -> int:
    """The study: run what is missing, record it, write the page."""
    failures = []
    if not args.no_training:
        settings = Settings(args.output, args.seeds, num_gpus=1, opts=args.opts)
        todo = list(jobs(study.TABLE, args.rows, settings))
        failures = study.run_study(todo, settings, args.records)
    with as_user_error(OSError), as_user_error(ValueError):
        study.write_page(args.records, args.page)
    print(f"written to {args.page}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def print_report(args: argparse.Namespace, settings: Settings) -> None:
    if args.format == "markdown":
        command = shlex.join(["tools/reproduce.py", *sys.argv[1:]])
        print("# Results of the paper's tables\n")
        for table in map(TABLES.get, args.tables):
            print(f"{markdown(table, report(table, settings), command)}\n")
        return
    records = [record for table in args.tables for record in report(TABLES[table], settings)]
    print(as_json(records) if args.format == "json" else as_csv(records))


if __name__ == "__main__":
    sys.exit(main())
