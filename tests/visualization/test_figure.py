"""The attention figure: its arrows, maps and titles, and the drawing of a detection."""

import warnings

import numpy as np
import pytest
from detectron2.data import Metadata
from matplotlib import get_data_path
from matplotlib.patches import FancyArrowPatch
from test_attention import QUERY, ColourPredictor, box_of, paint

from nl_detectron.visualization import attend, figure
from nl_detectron.visualization.figure import draw_attention, draw_objects


def arrows_of(axes):
    return [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]


@pytest.mark.parametrize("instantiation", ["embedded_gaussian", "dot_product"])
def test_arrows_and_maps(instantiation):
    signed = instantiation == "dot_product"
    predictor = ColourPredictor(instantiation, "pool_conv")
    if signed:
        predictor.model.backbone.res4.nonlocal0.theta.weight.data.neg_()
    image = paint(scale=2)
    image[box_of((2, 5), scale=2)] = 51, 0, 0  # a second target, a fifth as blue
    attention = attend(predictor, image)
    y, x = box_of(QUERY, scale=2)
    query = x.start, y.start
    figure = draw_attention(attention, "res4.0", [query, (1, 1)], arrows=4)

    left, right, black, _ = figure.axes
    assert left.get_gridspec().get_geometry() == (2, 2)  # 4, 1 for a wider image
    arrows = arrows_of(left)
    (row,) = attention.rows("res4.0", [query])
    (x, y, weight), *_ = attention.geometry["res4.0"].strongest(row, 3)
    assert (weight < 0) == signed
    assert arrows[-1]._posA_posB == [query, (x, y)]  # the strongest is on top
    # Weights below 1% of the largest have no arrow.
    widths = [0.4 + 1.6 * 0.2, 2.0] if signed else [2.0]
    assert [arrow.get_linewidth() for arrow in arrows] == pytest.approx(widths, rel=1e-3)
    first, second = left.get_title().splitlines()
    assert first.endswith(f": arrows to {len(arrows)} of 20 targets")
    assert second == "100% of the weight in the arrows, 0% in padding"
    assert right.images[1].get_clim() == ((weight, -weight) if signed else (0, weight))
    assert left.get_xlim() == (0, 76) and left.get_ylim() == (50, 0)
    assert len(arrows_of(black)) == (0 if signed else 4)  # all weights are 0, or equal


def test_labels_in_any_script(monkeypatch, tmp_path):
    (tmp_path / "Sans-Regular.ttf").write_bytes(b"not a font")
    fonts = [str(tmp_path / "Sans-Regular.ttf"), f"{get_data_path()}/fonts/ttf/STIXGeneral.ttf"]
    monkeypatch.setattr(figure, "findSystemFonts", lambda: fonts)
    monkeypatch.setattr(figure, "_find_family", figure._find_family.__wrapped__)
    image = np.zeros((480, 640, 3), np.uint8)
    found = {"category_id": 1, "bbox": [200, 200, 300, 200]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of matplotlib, on characters without a glyph
        draw_objects(image, [found], {1: "clé Ж قفل \u24b6 7%"}, Metadata())
    with pytest.warns(UserWarning) as caught:
        draw_objects(image, [found], {1: "红 Ж"}, Metadata())
    assert "no installed font has 红, drawn as squares" in str(caught[0].message)
