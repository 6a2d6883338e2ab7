"""A whole run: training with evaluation, or evaluation only."""

import argparse
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from multiprocessing import active_children
from typing import Optional

import detectron2.utils.comm as comm
from detectron2.config import CfgNode
from detectron2.engine import default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils.logger import setup_logger

from ..checkpoint import AuditedCheckpointer
from ..data.coco import CustomDataset, overrides, read_datasets
from ..errors import exit_on_user_error
from .checks import check
from .distributed import processes_of_torchrun
from .seed import with_seed
from .setup import find_config_file, load_config
from .stop_on_signal import forward_signals
from .trainer import Trainer


def main(args: argparse.Namespace) -> None:
    """Check the input, then train or evaluate.

    That is in as many processes as ``args`` say, or, under torchrun, in this one of its processes.

    Args:
        args: as :func:`argument_parser` gives them.
    """
    with exit_on_user_error(), processes_of_torchrun(args):
        args.config_file = find_config_file(args.config_file)
        datasets = read_datasets(args)
        cfg = load_config(args.config_file, args.opts, overrides=overrides(datasets))
        for dataset in datasets.values():
            dataset.register()
        check(cfg, args, datasets.values())
        spawns = args.num_gpus * args.num_machines > 1
        with forward_signals(active_children) if spawns else nullcontext():
            launch(
                run,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(cfg, args, list(datasets.values())),
            )


def run(
    cfg: CfgNode, args: argparse.Namespace, datasets: Sequence[CustomDataset] = ()
) -> Optional[dict]:
    """One process of a run.

    Args:
        cfg: frozen.
        args: as :func:`argument_parser` gives them.
        datasets: to be registered, as a spawned process knows nothing of its parent's.

    Returns:
        The results of the evaluation: task -> metric -> value. None after a training that had no
        TEST.EXPECTED_RESULTS to compare with.
    """
    with exit_on_user_error():
        for dataset in datasets:
            dataset.register()
        if not args.eval_only:
            cfg = with_seed(cfg, args.resume)
        default_setup(cfg, args)
        # That gave a handler to detectron2's loggers, not to ours.
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="nl_detectron")
        if cfg.MODEL.DEVICE == "cpu":
            logging.getLogger(__name__).info("Running on the CPU")
        if args.eval_only:
            return _evaluate(cfg, args.resume)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


def _evaluate(cfg: CfgNode, resume: bool) -> dict:
    model = Trainer.build_model(cfg)
    checkpointer = AuditedCheckpointer(model, cfg.OUTPUT_DIR, partial=cfg.MODEL.WEIGHTS_PARTIAL)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results
