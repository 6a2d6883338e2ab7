#!/usr/bin/env python
"""Train or evaluate a video classifier, with the flags of detectron2's train_net.py."""

import argparse
from typing import Optional

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from nl_video import load_config
from nl_video.data import check_videos, register_paths
from nl_video.trainer import VideoTrainer
from nl_video.weights import VideoCheckpointer

from nl_detectron.engine import check_nonlocal
from nl_detectron.engine.launch import choose_seed, torchrun_process_group
from nl_detectron.errors import exit_on_user_error


def setup(args: argparse.Namespace) -> CfgNode:
    """Return the frozen config, after the checks that need no model."""
    cfg = load_config(args.config_file, args.opts)
    check_nonlocal(cfg)
    if not args.eval_only:
        cfg = choose_seed(cfg, args.resume)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="nl_detectron")
    register_paths(cfg)
    check_videos(cfg, cfg.DATASETS.TEST + (() if args.eval_only else cfg.DATASETS.TRAIN))
    return cfg


def run(args: argparse.Namespace) -> Optional[dict]:
    """Train, or evaluate with --eval-only, in this process, which may be one of several."""
    with exit_on_user_error():
        cfg = setup(args)
        if not args.eval_only:
            trainer = VideoTrainer(cfg)
            trainer.resume_or_load(resume=args.resume)
            return trainer.train()
        model = VideoTrainer.build_model(cfg)
        partial = cfg.MODEL.WEIGHTS_PARTIAL
        checkpointer = VideoCheckpointer(model, cfg.OUTPUT_DIR, partial=partial)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = VideoTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results


def main(args: argparse.Namespace) -> None:
    with exit_on_user_error(), torchrun_process_group(args):
        launch(
            run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )


if __name__ == "__main__":
    main(default_argument_parser().parse_args())
