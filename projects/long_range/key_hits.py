#!/usr/bin/env python3
"""How often a block looks at the key, in the synthetic data.

For every lock of DATASETS.TEST the block is asked what it looks at most: from the lock's centre,
and from all positions in the lock's box together. A hit is a position that covers any of the key's
box.
"""

import argparse

from detectron2.data import DatasetCatalog, MetadataCatalog
from nl_detectron.engine.errors import as_user_error
from nl_detectron.visualization.key_hits import key_hits

from nl_detectron.engine import exit_on_user_error, load_config
from nl_detectron.engine.predictor import build_predictor
from nl_detectron.engine.setup import find_config_file
from nl_detectron.visualization import AttentionRecorder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="as of train_net.py")
    parser.add_argument("--block", metavar="NAME", help="such as res4.0; by default all of them")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, such as MODEL.WEIGHTS FILE"
    )
    args = parser.parse_args()

    with exit_on_user_error():
        cfg = load_config(find_config_file(args.config_file), args.opts)
        predictor = build_predictor(cfg)
        with as_user_error(ValueError):
            blocks = AttentionRecorder(predictor.model, [args.block] if args.block else []).names
            for name in cfg.DATASETS.TEST:
                dataset, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
                for block in blocks:
                    hits = key_hits(predictor, dataset, metadata.thing_classes, block)
                    print(f"\n{hits.table(f'{name}, {block}')}")


if __name__ == "__main__":
    main()
