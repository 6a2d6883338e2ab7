"""Fonts for labels in any script."""

import sys
import unicodedata
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from matplotlib.text import Text
from tqdm import tqdm

_chosen: dict[str, frozenset[str]] = {}  # family, the default first -> its characters
_missing: set[str] = set()  # characters that no installed font has


def use_fonts(figure: Figure) -> None:
    """Set fonts that have the characters of all texts; warn if no installed font has some.

    matplotlib's default font has Latin, Greek, Cyrillic, Arabic and Hebrew letters, and no Chinese,
    Japanese or Korean ones.
    """
    texts = figure.findobj(Text)
    characters = {c for text in texts for c in text.get_text() if c.isprintable()}
    if not _chosen:
        _chosen["sans-serif"] = _characters_of(findfont(FontProperties(family=["sans-serif"])))
    if new := characters.difference(_missing, *_chosen.values()):
        _find_fonts(new)
    for text in texts:
        text.set_fontfamily(list(_chosen))


def _find_fonts(missing: set[str]) -> None:
    for path in sorted(findSystemFonts(), key=_preference):
        found = _characters_of(path)
        if missing & found:
            fontManager.addfont(path)  # it may be newer than matplotlib's list of fonts
            _chosen[get_font(path).family_name] = found
            missing = missing - found
        if not missing:
            return
    _missing.update(missing)
    is_wide = any(unicodedata.east_asian_width(c) in "WF" for c in missing)
    tqdm.write(
        f"warning: no installed font has the characters {''.join(sorted(missing))} of labels; they "
        f"are drawn as squares. apt install fonts-noto-{'cjk' if is_wide else 'core'}",
        file=sys.stderr,
    )


def _characters_of(path: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, get_font(path).get_charmap()))
    except (OSError, RuntimeError):  # not a font that FreeType reads
        return frozenset()


def _preference(path: str) -> tuple:
    name = Path(path).stem.lower()
    # A font of last resort has a placeholder for every character.
    return "lastresort" in name, "sans" not in name, "regular" not in name, path
