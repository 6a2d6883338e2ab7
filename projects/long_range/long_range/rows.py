"""The rows of the study: what is trained, from where, and what it is compared with."""

from dataclasses import replace
from typing import Any, Tuple

from ..evaluation.tables import Row, Table


def _opts(**keys: Any) -> Tuple[str, ...]:
    """``KEY VALUE ...`` from keys of the config with two underscores for each dot."""
    return tuple(
        text for key, value in keys.items() for text in (key.replace("__", "."), str(value))
    )


R_50 = _opts(MODEL__RESNETS__DEPTH=50, MODEL__RESNETS__RES2_OUT_CHANNELS=256)
LONG = _opts(SOLVER__MAX_ITER=900, SOLVER__STEPS=(720,), TEST__EVAL_PERIOD=300)
WARM_UP = _opts(SOLVER__MAX_ITER=500, SOLVER__STEPS=(100000,), TEST__EVAL_PERIOD=0)


def _row(name: str, backbone: str = "", **nonlocal_keys: Any) -> Row:
    """A row that goes on from the warmed-up R18, with one more thing in the backbone."""
    keys = {"MODEL__WEIGHTS_PARTIAL": True}  # the convolutions are no blocks, but new all the same
    if backbone:
        keys["MODEL__BACKBONE__NAME"] = backbone
    else:
        keys["MODEL__BACKBONE__NAME"] = "build_nonlocal_backbone"
        keys["MODEL__NONLOCAL__BACKBONE"] = "build_nonlocal_narrow_resnet_fpn_backbone"
    keys.update({f"MODEL__NONLOCAL__{key}": value for key, value in nonlocal_keys.items()})
    return Row(name, "R18", opts=_opts(**keys), start="R18_warm_up")


def _control(name: str) -> Row:
    return _row(name, f"build_nonlocal_control_{name}_backbone")


def _long(row: Row) -> Row:
    """The same, trained three times as long."""
    baseline = row.baseline and f"{row.baseline}_long"
    return replace(row, name=f"{row.name}_long", baseline=baseline, opts=(*row.opts, *LONG))


R_18 = Row("R18", opts=_opts(MODEL__WEIGHTS_PARTIAL=True), start="R18_warm_up")
DEEPER = Row("R50", "R18", opts=R_50, start="R50_warm_up")
FUNCTIONS = (
    _row("NL_gaussian", INSTANTIATION="gaussian"),
    _row("NL_dot_product", INSTANTIATION="dot_product"),
    _row("NL_concatenation", INSTANTIATION="concatenation"),
)

TABLE = Table(
    "Harder synthetic long-range data",
    "Synthetic/faster_rcnn_hard.yaml",
    ("bbox/AP", "bbox/AP50", "bbox/AP75"),
    [
        Row("R18_warm_up", opts=WARM_UP),
        Row("R50_warm_up", opts=(*R_50, *WARM_UP)),
        R_18,
        _row("NL"),
        _control("mean"),
        _control("local"),
        _control("conv1x1"),
        _control("conv3x3"),
        DEEPER,
        *FUNCTIONS,
        _row("NL_2_blocks", LOCATION=("res4.*",)),
        _row("NL_4_blocks", LOCATION=("res3.*", "res4.*")),
        _row("NL_res3", LOCATION=("res3.-2",)),
        _row("NL_res2", LOCATION=("res2.-2",)),
        _row("NL_no_subsampling", SUBSAMPLE="none"),
        _row("NL_conv_pool", SUBSAMPLE="conv_pool"),
        _row("NL_no_scale", SCALE=False),
        _row("NL_BN", NORM="BN"),
        _row("NL_GN", NORM="GN"),
        _row("NL_reduction_1", REDUCTION=1),
        _row("NL_reduction_4", REDUCTION=4),
        _long(R_18),
        _long(_row("NL")),
        _long(_control("mean")),
        _long(_control("conv3x3")),
        _long(DEEPER),
        *map(_long, FUNCTIONS),
    ],
    image_size=(96, 320),
)
