"""``build_nonlocal_backbone``: any registered backbone, with non-local blocks in its stages."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from .insertion import insert_nonlocal


@BACKBONE_REGISTRY.register()
def build_nonlocal_backbone(cfg, input_shape: ShapeSpec) -> Backbone:
    """Build the backbone named in ``MODEL.NONLOCAL.BACKBONE`` and insert the blocks into it.

    The backbone object itself is returned, not a wrapper around it: every key of its state dict
    stays what it was, and the blocks' keys are new.

    Raises:
        ValueError: a key of ``MODEL.NONLOCAL`` has a bad value; the message names key and value.
    """
    options = cfg.MODEL.NONLOCAL
    if options.BACKBONE == build_nonlocal_backbone.__name__:
        raise ValueError(
            f"MODEL.NONLOCAL.BACKBONE is {options.BACKBONE!r} itself; name the plain backbone, "
            "such as 'build_resnet_fpn_backbone'"
        )
    if options.BACKBONE not in BACKBONE_REGISTRY:
        raise ValueError(
            f"MODEL.NONLOCAL.BACKBONE {options.BACKBONE!r} is not registered; "
            f"registered: {', '.join(sorted(name for name, _ in BACKBONE_REGISTRY))}"
        )
    backbone = BACKBONE_REGISTRY.get(options.BACKBONE)(cfg, input_shape)
    try:
        insert_nonlocal(
            backbone,
            options.LOCATION,
            instantiation=options.INSTANTIATION,
            scale=options.SCALE,
            reduction=options.REDUCTION,
            subsample=options.SUBSAMPLE,
            norm=options.NORM,
        )
    except ValueError as error:
        raise ValueError(f"MODEL.NONLOCAL: {error}") from None
    return backbone
