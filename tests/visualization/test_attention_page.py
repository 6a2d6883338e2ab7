"""The attention page: its numbers, its size, and its behaviour in Chromium."""

import base64
import json
import re
import shutil
import zlib

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from helpers import TINY

from nl_detectron.engine import build_predictor, load_config
from nl_detectron.visualization import attend
from nl_detectron.visualization.attention_page import LEVELS, attention_page

HEIGHT, WIDTH, RESIZED = 97, 320, (64, 211)  # the image, and its size after resizing
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def attention_of(size, *options):
    torch.manual_seed(0)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return attend(build_predictor(load_config(TINY, options)), noise)


@pytest.fixture(scope="module")
def attention():
    """Two blocks: res3.1 with 8 x 28 queries and 4 x 14 targets, res4.4 with half as many."""
    blocks = ["MODEL.NONLOCAL.LOCATION", "['res3.1', 'res4.4']"]
    return attention_of((HEIGHT, WIDTH), *blocks, "MODEL.NONLOCAL.INSTANTIATION", "dot_product")


@pytest.fixture(scope="module")
def instances():
    found = Instances((HEIGHT, WIDTH), scores=torch.tensor([0.987, 0.5]))
    found.pred_boxes = Boxes(torch.tensor([[200.0, 20.0, 260.0, 60.0], [10.0, 5.0, 60.0, 90.0]]))
    found.pred_classes = torch.tensor([1, 0])
    return found


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_all_weights(attention):
    """The page has the largest weight of each query, and all others relative to it."""
    blocks = data_of(attention_page(attention, "noise.png"))["blocks"]
    assert [block["name"] for block in blocks] == ["res3.1", "res4.4"]
    for block, stride in zip(blocks, (8, 16)):
        counts = [-(-side // stride) for side in RESIZED]
        assert [len(indices) for indices in block["queries"]] == counts
        height, width = block["targets"]
        assert [height, width] == [-(-side // (2 * stride)) for side in RESIZED]
        queries = torch.cartesian_prod(*map(torch.tensor, block["queries"]))
        rows = attention.recorder.rows(block["name"], queries)
        buffer = zlib.decompress(base64.b64decode(block["maps"]))
        largest, padding = np.frombuffer(buffer, "<f4", 2 * len(rows)).reshape(2, -1)
        levels = np.frombuffer(buffer, "i1", offset=8 * len(rows)).reshape(len(rows), -1)
        shares = attention.geometry[block["name"]].padding_share(rows)
        assert padding.tolist() == shares.tolist()
        exact = rows[:, :height, :width].flatten(1).double().numpy()
        assert largest.tolist() == np.abs(exact).max(1).tolist()
        root = np.sign(exact) * np.sqrt(np.abs(exact) / largest[:, None])
        assert np.abs(levels - LEVELS * root).max() <= 0.5 + 1e-4


def test_detections_are_shown_with_their_classes(attention, instances):
    data = data_of(attention_page(attention, "noise.png", instances, ["<lock>", "key"]))
    assert [detection["label"] for detection in data["detections"]] == ["key 99%", "<lock> 50%"]
    assert data["detections"][1]["box"] == [10.0, 5.0, 60.0, 90.0]


@pytest.mark.parametrize("subsample, step", [("pool_conv", 1), ("none", 2)])
def test_page_of_a_large_image_is_below_10_MB(subsample, step):
    options = ["INPUT.MIN_SIZE_TEST", 800, "MODEL.NONLOCAL.SUBSAMPLE", subsample]
    attention = attention_of((800, 1344), "INPUT.MAX_SIZE_TEST", 1344, *options)
    page = attention_page(attention, "noise.png")
    assert len(page.encode()) < 10e6
    (block,) = data_of(page)["blocks"]
    assert block["queries"] == [list(range(step - 1, count, step)) for count in (50, 84)]


def assert_shows(page, attention, name, point):
    """The readout must state the strongest target of the query, and the share of padding."""
    (row,) = attention.rows(name, [point])
    ((x, y, weight),) = attention.geometry[name].strongest(row, 1)
    padding = 100 * attention.geometry[name].padding_share(row[None]).item()
    readout = r"Query .* strongest (.+) at \((.+), (.+)\); (.+) % of the weight in padding"
    text = page.inner_text("#readout").replace("\N{MINUS SIGN}", "-")
    shown = tuple(map(float, re.match(readout, text).groups()))
    assert shown == pytest.approx((float(f"{weight:.2g}"), x, y, padding), abs=0.051, rel=1e-9)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_in_chromium(attention, instances, tmp_path):
    """The pointer and the keys move the query. The page loads nothing and logs no error."""
    sync_api = pytest.importorskip("playwright.sync_api")
    file = tmp_path / "page.html"
    file.write_text(attention_page(attention, "noise.png", instances), "utf-8")
    events = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 375, "height": 700}, has_touch=True)
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on("request", lambda request: events.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#readout:not(:empty)")
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        assert_shows(page, attention, "res3.1", (230.0, 40.0))  # the centre of the first detection
        page.keyboard.press("Tab")
        page.keyboard.press("Shift+ArrowLeft")
        assert_shows(page, attention, "res3.1", (230 - 5 * 8 * WIDTH / RESIZED[1], 40))
        box = page.locator("#stage").bounding_box()
        scale = box["width"] / WIDTH
        for name in ("res4.4", "res3.1"):
            page.select_option("#block", name)
            page.wait_for_selector(f"#about:text('{name}:')")
            for act in (page.mouse.move, page.touchscreen.tap):
                for x, y in [(4.0, 5.0), (250.0, 1.0), (100.5, 40.0)]:
                    act(box["x"] + x * scale, box["y"] + y * scale)
                    assert_shows(page, attention, name, (x, y))
        page.locator("#arrows").fill("3")
        assert page.locator(".arrow").count() == 3
        page.check("#detections")
        assert page.locator(".box text").all_text_contents() == ["class 1 99%", "class 0 50%"]
        browser.close()
    assert [event for event in events if not event.startswith("data:")] == [file.as_uri()]
