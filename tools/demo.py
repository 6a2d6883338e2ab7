#!/usr/bin/env python3
"""Train Mask R-CNN on the synthetic long-range data, without and with a non-local block.

Both runs have the same seed, schedule and data. If the demo is started again, it skips finished
runs and resumes the others; delete the output folder to start from scratch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from nl_detectron.data.synthetic import KEYS, LOCKS
from nl_detectron.errors import exit_on_user_error
from nl_detectron.evaluation import TABLES, comparison_table, read_run
from nl_detectron.evaluation.runner import jobs, run_jobs
from nl_detectron.files import write_atomically


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), metavar="DIR")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for both configs")
    args = parser.parse_args(arguments)

    with exit_on_user_error():
        todo = jobs(TABLES["synthetic"], args.output, opts=args.opts)
        failures = run_jobs(todo)
        if failures:
            sys.exit("\n".join(failures))
        baseline, nonlocal_ = (read_run(job.folder) for job in todo)
    groups = {"keys": KEYS, "locks": LOCKS}
    table = comparison_table(baseline, nonlocal_, name="+1 NL", groups=groups)
    path = args.output / "table.md"
    with exit_on_user_error(), write_atomically(str(path), "w") as file:
        print(table, file=file)
    print(f"\n{table}\n\nwritten to {path}; see also metrics.json of each run in {args.output}")


if __name__ == "__main__":
    main()
