"""The rows of the study: config options of each, and the row that it starts from."""

from typing import Optional

# The new block has no weights in the file that a row starts from.
PARTIAL = ["MODEL.WEIGHTS_PARTIAL", "True"]
NL = [
    *PARTIAL,
    *("MODEL.BACKBONE.NAME", "build_nonlocal_backbone"),
    *("MODEL.NONLOCAL.BACKBONE", "build_nonlocal_narrow_resnet_fpn_backbone"),
]
R50 = ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"]
LONG = ["SOLVER.MAX_ITER", "900", "SOLVER.STEPS", "(720,)", "TEST.EVAL_PERIOD", "300"]
WARM_UP = ["SOLVER.MAX_ITER", "500", "SOLVER.STEPS", "(100000,)", "TEST.EVAL_PERIOD", "0"]


def _control(name: str) -> list[str]:
    return [*PARTIAL, "MODEL.BACKBONE.NAME", f"build_nonlocal_control_{name}_backbone"]


ROWS = {
    "R18_warm_up": WARM_UP,
    "R50_warm_up": [*R50, *WARM_UP],
    "R18": PARTIAL,
    "NL": NL,
    "mean": _control("mean"),
    "local": _control("local"),
    "conv1x1": _control("conv1x1"),
    "conv3x3": _control("conv3x3"),
    "R50": R50,
    "NL_gaussian": [*NL, "MODEL.NONLOCAL.INSTANTIATION", "gaussian"],
    "NL_dot_product": [*NL, "MODEL.NONLOCAL.INSTANTIATION", "dot_product"],
    "NL_concatenation": [*NL, "MODEL.NONLOCAL.INSTANTIATION", "concatenation"],
    "NL_2_blocks": [*NL, "MODEL.NONLOCAL.LOCATION", "('res4.*',)"],
    "NL_4_blocks": [*NL, "MODEL.NONLOCAL.LOCATION", "('res3.*', 'res4.*')"],
    "NL_res3": [*NL, "MODEL.NONLOCAL.LOCATION", "('res3.-2',)"],
    "NL_res2": [*NL, "MODEL.NONLOCAL.LOCATION", "('res2.-2',)"],
    "NL_no_subsampling": [*NL, "MODEL.NONLOCAL.SUBSAMPLE", "none"],
    "NL_conv_pool": [*NL, "MODEL.NONLOCAL.SUBSAMPLE", "conv_pool"],
    "NL_no_scale": [*NL, "MODEL.NONLOCAL.SCALE", "False"],
    "NL_BN": [*NL, "MODEL.NONLOCAL.NORM", "BN"],
    "NL_GN": [*NL, "MODEL.NONLOCAL.NORM", "GN"],
    "NL_reduction_1": [*NL, "MODEL.NONLOCAL.REDUCTION", "1"],
    "NL_reduction_4": [*NL, "MODEL.NONLOCAL.REDUCTION", "4"],
}
FUNCTIONS = ("NL_gaussian", "NL_dot_product", "NL_concatenation")
for _name in ("R18", "NL", "mean", "conv3x3", "R50", *FUNCTIONS):
    ROWS[f"{_name}_long"] = [*ROWS[_name], *LONG]


def start_row(name: str) -> Optional[str]:
    """Return the row whose final weights, of the same seed, a row starts from, or None."""
    if name.endswith("_warm_up"):
        return None
    return "R50_warm_up" if name.startswith("R50") else "R18_warm_up"
