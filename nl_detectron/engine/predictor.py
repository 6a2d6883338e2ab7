"""detectron2's predictor for single images, with weights that are audited."""

from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor

from ..checkpoint import AuditedCheckpointer


def build_predictor(cfg: CfgNode) -> DefaultPredictor:
    """The model of a config with its weights, as a function of a BGR image.

    Raises:
        UserError: a key has a bad value, or MODEL.WEIGHTS does not fit or cannot be read.
    """
    bare = cfg.clone()
    bare.defrost()
    bare.MODEL.WEIGHTS = ""  # or it would load the file itself, and trust it
    predictor = DefaultPredictor(bare)
    checkpointer = AuditedCheckpointer(predictor.model, partial=cfg.MODEL.WEIGHTS_PARTIAL)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    return predictor
