"""Pairs of keypoints that exchange places when an image is flipped."""

import re
from collections.abc import Sequence

from ..errors import UserError

# Words of a name: LEFT, Left, left, L, 12. "LEye" has two, "L" and "Eye".
WORDS = re.compile(r"[^\W\d_a-z]+(?![a-z])|[^\W\d_]?[^\W\d_A-Z]+|\d+")
SIDES = (("left", "right"), ("l", "r"))


def keypoint_flip_map(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of left and right keypoints.

    A name has "left" or "l" as a word, in any case and with any separator, or begins or ends with
    it. The partner has "right" or "r" in its place.
    """
    by_words = {"".join(_words(name)): name for name in names}
    pairs = []
    for name in names:
        partner = next((by_words[m] for m in _mirrored(_words(name)) if m in by_words), None)
        if partner is not None and not any({name, partner} & set(pair) for pair in pairs):
            pairs.append((name, partner))
    return pairs


def read_flip_map(names: Sequence[str], text: str) -> list[tuple[str, str]]:
    """Return the pairs of ``--keypoint-flip-map``, which are written as "LEFT:RIGHT,..."."""
    result = [tuple(pair.split(":")) for pair in text.split(",")]
    used = [name for pair in result for name in pair]
    if any(len(pair) != 2 for pair in result) or len(set(used)) < len(used):
        raise UserError(f"--keypoint-flip-map takes LEFT:RIGHT,..., each name once, not {text!r}")
    if unknown := sorted(set(used) - set(names)):
        raise UserError(f"--keypoint-flip-map: no keypoint {unknown[0]!r} in {', '.join(names)}")
    return result


def _words(name: str) -> list[str]:
    return [word.lower() for word in WORDS.findall(name)]


def _mirrored(words: list[str]) -> list[str]:
    """Return possible names of the right keypoint, if this may be the left one."""
    joined, result = "".join(words), []
    for left, right in SIDES:
        if left in words:
            result.append("".join(right if word == left else word for word in words))
        if joined.startswith(left):
            result.append(right + joined.removeprefix(left))
        if joined.endswith(left):
            result.append(joined.removesuffix(left) + right)
    return result
