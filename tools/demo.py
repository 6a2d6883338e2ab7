#!/usr/bin/env python3
"""Train Mask R-CNN on the synthetic long-range data, without and with a non-local block.

Both runs have the same seed, schedule and data. What is finished is not run again, and what was
interrupted goes on from its last checkpoint; delete the output folder to start anew.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from nl_detectron import get_config_file
from nl_detectron.data.synthetic import KEYS, LOCKS
from nl_detectron.evaluation import comparison_table, read_run

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    "baseline": "Synthetic/mask_rcnn_R_18_FPN.yaml",
    "nonlocal": "Synthetic/mask_rcnn_R_18_FPN_NL.yaml",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), metavar="DIR")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for both configs")
    args = parser.parse_args()

    for number, (name, config) in enumerate(CONFIGS.items(), start=1):
        folder = args.output / name
        if (folder / "model_final.pth").exists():
            print(f"[{number}/{len(CONFIGS)}] {folder} is finished: not run again", flush=True)
            continue
        command = [sys.executable, str(ROOT / "train_net.py"), "--resume"]
        command += ["--config-file", get_config_file(config), *args.opts]
        command += ["OUTPUT_DIR", str(folder)]
        print(f"[{number}/{len(CONFIGS)}] {' '.join(command)}", flush=True)
        status = subprocess.run(command).returncode
        if status:
            sys.exit(status)

    table = comparison_table(
        *(read_run(args.output / name) for name in CONFIGS),
        name="+1 NL",
        groups={"keys": KEYS, "locks": LOCKS},
    )
    (args.output / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\nwritten to {args.output / 'table.md'}")


if __name__ == "__main__":
    main()
