"""Sizes of what is measured: feature maps of an image, by the name of a ResNet's stage."""

import re
from dataclasses import dataclass

STAGES = {"res4": "1024x50x84", "res3": "512x100x168"}  # of an 800x1344 image
REDUCTION = 2  # the paper's: inner channels = channels / 2


@dataclass(frozen=True)
class Size:
    """A feature map of (batch, channels, height, width)."""

    batch: int
    channels: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def inner_channels(self) -> int:
        return self.channels // REDUCTION

    def facts(self) -> dict:
        """Columns of the table."""
        return {"B": self.batch, "C": self.channels, "N": self.positions}


SMALL = Size(2, 32, 6, 8)  # where the competitors' agreement is checked


def parse_size(text: str, batch: int) -> Size:
    """A stage of ``STAGES``, or ``CxHxW``.

    Raises:
        ValueError: it is neither, or a side is not positive, or the channels are odd.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", STAGES.get(text, text))
    channels, height, width = map(int, match.groups()) if match else (0, 0, 0)
    if min(channels, height, width) < 1 or channels % REDUCTION:
        raise ValueError(
            f"size {text!r} is neither {' nor '.join(STAGES)} nor CxHxW with an even C, "
            "such as 1024x25x42"
        )
    return Size(batch, channels, height, width)
