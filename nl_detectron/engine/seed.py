"""The seed of a run."""

import json
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm


def with_seed(cfg: CfgNode, resume: bool) -> CfgNode:
    """The config with a SEED that is not negative: a random one if it was.

    It is then in ``config.yaml`` and ``environment.json`` of the run.

    Args:
        cfg: frozen.
        resume: take the seed that the run in OUTPUT_DIR has drawn, if there is one.

    Returns:
        ``cfg`` itself, or a frozen copy. The same in all processes.
    """
    if cfg.SEED >= 0:
        return cfg
    seed = comm.shared_random_seed()
    record = Path(cfg.OUTPUT_DIR, "environment.json")
    if resume and record.exists():
        seed = json.loads(record.read_text()).get("seed", seed)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = comm.all_gather(seed)[0]  # OUTPUT_DIR may be on the first machine only
    cfg.freeze()
    return cfg
