"""Labels outside Latin: drawn in a font that has the characters, or a warning."""

import numpy as np
import pytest
from detectron2.data import Metadata
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from nl_detectron.visualization import fonts
from nl_detectron.visualization.figure import draw_objects

IMAGE = np.full((480, 640, 3), 90, dtype=np.uint8)
OBJECT = {"category_id": 1, "bbox": [200, 200, 300, 200]}


@pytest.fixture
def font(tmp_path):
    """Write a font whose one character, 红, is a filled square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "red"])
    builder.setupCharacterMap({ord("红"): "red"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "red": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "red": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Test Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    yield str(tmp_path / "squares.ttf")
    known = font_manager.fontManager.ttflist
    known[:] = [entry for entry in known if entry.name != "Test Squares"]


def draw(monkeypatch, name, *system_fonts):
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: list(system_fonts))
    monkeypatch.setattr(fonts, "_chosen", {})
    monkeypatch.setattr(fonts, "_missing", set())
    return draw_objects(IMAGE, [OBJECT], {1: name}, Metadata())


@pytest.mark.filterwarnings("ignore:Glyph")  # of matplotlib
def test_characters_outside_latin(monkeypatch, font, tmp_path, capsys):
    bad = tmp_path / "sans-regular.ttf"
    bad.write_bytes(b"not a font")
    squares = draw(monkeypatch, "红红红 Ж", str(bad), font)
    assert capsys.readouterr().err == ""
    without = draw(monkeypatch, "红红红 Ж", str(bad))
    (warning,) = capsys.readouterr().err.splitlines()
    assert "no installed font has the characters 红 of labels" in warning
    assert warning.endswith("apt install fonts-noto-cjk")
    draw_objects(IMAGE, [OBJECT], {1: "红"}, Metadata())
    assert capsys.readouterr().err == ""  # it has been said
    bright = [(drawn.max(axis=2) > 200).sum() for drawn in (squares, without)]
    assert bright[0] > 1.5 * bright[1]  # filled squares instead of empty ones


def test_default_font(monkeypatch, capsys):
    """No other font is looked for."""
    monkeypatch.setattr(fonts, "_chosen", {})
    monkeypatch.setattr(fonts, "findSystemFonts", None)
    draw_objects(IMAGE, [OBJECT], {1: "clé Ж قفل 7%"}, Metadata())
    assert capsys.readouterr().err == ""
