"""detectron2's predictor for single images, with weights that are audited."""

from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor

from ..checkpoint import AuditedCheckpointer, LoadError
from .errors import as_user_error
from .values import check_values, missing_feature_as_user_error


def build_predictor(cfg: CfgNode) -> DefaultPredictor:
    """The model of a config with its weights, as a function of a BGR image.

    Raises:
        UserError: a key has a bad value, or MODEL.WEIGHTS does not fit or cannot be read.
    """
    check_values(cfg)
    bare = cfg.clone()
    bare.defrost()
    bare.MODEL.WEIGHTS = ""  # or it would load the file itself, and trust it
    with as_user_error(ValueError, about="MODEL.NONLOCAL"), missing_feature_as_user_error(cfg):
        predictor = DefaultPredictor(bare)
    checkpointer = AuditedCheckpointer(predictor.model, partial=cfg.MODEL.WEIGHTS_PARTIAL)
    # The latter two: no such file.
    with as_user_error(LoadError), as_user_error(OSError), as_user_error(AssertionError):
        checkpointer.load(cfg.MODEL.WEIGHTS)
    return predictor
