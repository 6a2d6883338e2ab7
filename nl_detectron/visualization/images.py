"""The images that are drawn on."""

from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import read_image

from ..errors import UserError

MIN_SIDE = 640  # pixels of the longer side: smaller images are enlarged, for labels to be legible


class InputError(UserError):
    """An image or a video cannot be read; the message names it."""


def read(path: Path, channels: str) -> np.ndarray:
    """
    Args:
        channels: "BGR" or "RGB".

    Returns:
        (height, width, 3), uint8.

    Raises:
        InputError: it is not there, or is no image.
    """
    try:
        return read_image(str(path), channels)
    except Exception as error:  # what decoders raise on broken files can be anything
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path} cannot be read ({problem})") from error


def legible_scale(image: np.ndarray) -> float:
    """By how much to enlarge an image, (height, width, 3), before it is drawn on."""
    return max(1.0, MIN_SIDE / max(image.shape[:2]))
