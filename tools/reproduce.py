#!/usr/bin/env python3
"""Reproduce the paper's detection tables.

examples:
  tools/reproduce.py plan table5 --num-gpus 8
  tools/reproduce.py run table5 --rows R_50_FPN_noaug_1x R_50_FPN_NL_noaug_1x --num-gpus 8
  tools/reproduce.py report table5 table6

"plan" prints the state and the command of each run and starts nothing. "run" can be stopped at any
time and started again: it skips finished runs and resumes the others. A failed run does not stop
the others. "report" prints Markdown tables, with measured numbers where there are finished runs.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from nl_detectron.errors import exit_on_user_error
from nl_detectron.evaluation import TABLES
from nl_detectron.evaluation.report import report
from nl_detectron.evaluation.runner import jobs, run_jobs
from nl_detectron.evaluation.runs import final_metrics

OUTPUT = Path("output/reproduce")


def positive(text: str) -> int:
    """Convert an argument to an int of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_arguments(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ("plan", "run", "report"):
        sub = actions.add_parser(action)
        sub.add_argument("tables", nargs="+", choices=list(TABLES), metavar="TABLE")
        sub.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR")
        if action != "report":
            help = "number of runs per row (default: %(default)s)"
            sub.add_argument("--seeds", type=positive, default=3, help=help)
            help = "GPUs per run (default: %(default)s)"
            sub.add_argument("--num-gpus", type=positive, default=1, help=help)
            sub.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="default: all")
            help = "options for every config"
            sub.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help=help)
    return parser.parse_args(arguments)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    args = parse_arguments(arguments)
    with exit_on_user_error():
        if args.action == "report":
            command = ["tools/reproduce.py", "report", *args.tables]
            command += [] if args.output == OUTPUT else ["--output", str(args.output)]
            print(f"# Model zoo\n\nWritten by `{shlex.join(command)}`.\n")
            print(report([TABLES[table] for table in args.tables], args.output))
            return 0
        todo = []
        for table in args.tables:
            options = {"rows": args.rows, "seeds": args.seeds, "num_gpus": args.num_gpus}
            todo += jobs(TABLES[table], args.output, **options, opts=args.opts)
        if args.action == "plan":
            for job in todo:
                state = f"at iteration {job.iteration()}" if job.iteration() else "not begun"
                state = "finished" if final_metrics(job.folder) else state
                print(f"{state}: {shlex.join(job.command)}")
            return 0
        failures = run_jobs(todo)
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
