"""The keys of ``MODEL.NONLOCAL``, as the builders read them."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator

from detectron2.config import CfgNode


def block_options(cfg: CfgNode) -> Dict[str, Any]:
    """The keyword arguments of NonLocalBlock that the config has keys for."""
    options = cfg.MODEL.NONLOCAL
    return {
        "instantiation": options.INSTANTIATION,
        "scale": options.SCALE,
        "reduction": options.REDUCTION,
        "subsample": options.SUBSAMPLE,
        "norm": options.NORM,
    }


@contextmanager
def name_the_key() -> Iterator[None]:
    """Restate a ValueError about an option, with which its message begins, as one about its key."""
    try:
        yield
    except ValueError as error:
        option, problem = str(error).split(maxsplit=1)
        raise ValueError(f"MODEL.NONLOCAL.{option.upper()} {problem}") from None
