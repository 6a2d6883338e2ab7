"""The attention page: its numbers, its size, and its behaviour in Chromium."""

import base64
import importlib.util
import json
import re
import shutil
import zlib
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from nl_detectron.layers import NonLocalBlock
from nl_detectron.visualization import Attention, AttentionRecorder
from nl_detectron.visualization.attention import ImageGeometry
from nl_detectron.visualization.attention_page import LEVELS, STRONGEST, attention_page

IMAGE_SIZE, RESIZED_SIZE, PADDED_SIZE = (97, 333), (146, 501), (160, 512)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium and playwright",
)


def attention_of(image, padded_size, resized_size, blocks):
    """Run a backbone of blocks, {stage: (stride, options)}, on random pixels."""
    generator = torch.Generator().manual_seed(0)
    stages, channels, stride = OrderedDict(), 3, 1
    for stage, (stage_stride, options) in blocks.items():
        block = NonLocalBlock(8, **options)
        for weight in (block.theta.weight, block.phi.weight):
            nn.init.normal_(weight, std=0.3, generator=generator)
        convolution = nn.Conv2d(channels, 8, 1)
        nn.init.normal_(convolution.weight, std=2.0, generator=generator)
        pool = nn.AvgPool2d(stage_stride // stride)
        parts = {"convolution": convolution, "pool": pool, "nonlocal1": block}
        stages[stage] = nn.Sequential(OrderedDict(parts))
        channels, stride = 8, stage_stride
    backbone = nn.Sequential(stages).double()
    pixels = 10 * torch.randn(1, 3, *padded_size, generator=generator)
    with AttentionRecorder(backbone) as recorder, torch.no_grad():
        backbone(pixels.double())
    geometry = {
        name: ImageGeometry.from_recorder(recorder, name, image.shape[:2], resized_size)
        for name in recorder.blocks
    }
    return Attention(image, {}, recorder, geometry)


@pytest.fixture(scope="module")
def attention():
    """Two blocks: res3.1 with 10 x 32 queries and 5 x 16 targets, and res4.1 with signs."""
    noise = np.random.default_rng(0).integers(0, 256, (*IMAGE_SIZE, 3), dtype=np.uint8)
    blocks = {
        "res3": (16, {}),
        "res4": (32, {"instantiation": "dot_product", "subsample": "none"}),
    }
    return attention_of(noise, PADDED_SIZE, RESIZED_SIZE, blocks)


@pytest.fixture(scope="module")
def instances():
    found = Instances(IMAGE_SIZE)
    found.pred_boxes = Boxes(torch.tensor([[200.0, 20.0, 260.0, 60.0], [10.0, 5.0, 60.0, 90.0]]))
    found.scores = torch.tensor([0.987, 0.5])
    found.pred_classes = torch.tensor([1, 0])
    return found


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def unpack(block):
    """Return the arrays of a block: indices and weights of targets, share of padding, levels."""
    queries = len(block["queries"]["x"]) * len(block["queries"]["y"])
    targets = len(block["targets"]["x"]) * len(block["targets"]["y"])
    buffer, arrays = zlib.decompress(base64.b64decode(block["data"])), []
    widths = block["strongest"], block["strongest"], 1, targets
    for dtype, width in zip(("<i4", "<f4", "<f4", "i1"), widths):
        array = np.frombuffer(buffer, dtype, queries * width)
        arrays.append(array.reshape(queries, width))
        buffer = buffer[array.nbytes :]
    assert not buffer
    return arrays


def points_of(grid):
    return [(x, y) for y in grid["y"] for x in grid["x"]]


def test_holds_every_query_of_every_block(attention, instances):
    data = data_of(attention_page(attention, "noise.png", instances))
    assert [block["name"] for block in data["blocks"]] == ["res3.1", "res4.1"]
    assert [block["signed"] for block in data["blocks"]] == [False, True]
    for block in data["blocks"]:
        name, geometry = block["name"], attention.geometry[block["name"]]
        queries = points_of(block["queries"])
        stride = {"res3.1": 16, "res4.1": 32}[name]
        assert len(queries) == -(-RESIZED_SIZE[0] // stride) * -(-RESIZED_SIZE[1] // stride)
        rows = attention.rows(name, queries)
        targets = points_of(block["targets"])
        index, weights, padding, levels = unpack(block)
        assert padding.ravel().tolist() == geometry.padding_share(rows).float().tolist()
        for i, row in enumerate(rows):
            strongest = geometry.strongest(row, STRONGEST)
            assert [targets[n] for n in index[i]] == [(x, y) for x, y, _ in strongest]
            assert weights[i].tolist() == [float(np.float32(weight)) for *_, weight in strongest]
            exact = row[geometry.in_image()].double().numpy()
            root = np.sqrt(np.abs(exact) / np.abs(exact).max())
            assert np.abs(levels[i] - np.sign(exact) * LEVELS * root).max() <= 0.5 + 1e-4


def test_detections_are_shown_with_their_classes(attention, instances):
    data = data_of(attention_page(attention, "noise.png", instances, ["<lock>", "key"]))
    assert [detection["label"] for detection in data["detections"]] == ["key 99%", "<lock> 50%"]
    assert data["detections"][1]["box"] == [10.0, 5.0, 60.0, 90.0]
    assert data["start"] == [230.0, 40.0]
    assert data_of(attention_page(attention, "noise.png"))["start"] == [333 / 2, 97 / 2]


@pytest.mark.parametrize("subsample, step", [("pool_conv", 1), ("none", 2)])
def test_is_below_10_MB_for_an_image_of_800_x_1344(subsample, step):
    noise = np.random.default_rng(0).integers(0, 256, (800, 1344, 3), dtype=np.uint8)
    blocks = {"res4": (16, {"subsample": subsample})}
    attention = attention_of(noise, (800, 1344), (800, 1344), blocks)
    page = attention_page(attention, "noise.png")
    assert len(page.encode()) < 10e6
    (block,) = data_of(page)["blocks"]
    assert (len(block["queries"]["y"]), len(block["queries"]["x"])) == (50 // step, 84 // step)
    assert block["queries"]["cell"] == [16 * step, 16 * step]
    assert ("limit the file size" in block["about"]) == (step > 1)
    # The last of 2 x 2 positions stands for all; its centre is 24.
    assert block["queries"]["x"][0] == 16 * (step - 0.5)


# ---- in Chromium ----


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(attention, instances, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text(attention_page(attention, "noise.png", instances), "utf-8")
    return file


@pytest.fixture
def open_page(chromium, page_file):
    """Open the page. At the end, it must have loaded nothing and logged no error."""
    contexts, messages, requests = [], [], []

    def open_in(*, script="", width=1280, **options):
        context = chromium.new_context(viewport={"width": width, "height": 700}, **options)
        contexts.append(context)
        page = context.new_page()
        page.add_init_script(script)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri())
        page.wait_for_selector("#readout:not(:empty)")
        return page

    yield open_in
    for context in contexts:
        context.close()
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()] * len(
        contexts
    )


def choose(page, name):
    page.select_option("#block", name)
    page.wait_for_selector(f"#about:text('{name}:')")


READOUT = re.compile(
    r"Query \((.+), (.+)\): strongest (.+) at \((.+), (.+)\); (.+) % of the weight in padding"
)


def readout(page):
    """Return x and y of the query; weight, x and y of the strongest target; percent in padding."""
    text = page.inner_text("#readout").replace("\N{MINUS SIGN}", "-")
    return tuple(map(float, READOUT.match(text).groups()))


def expected(attention, name, point):
    """Return what the readout should be, computed from the row of the matrix."""
    geometry = attention.geometry[name]
    (row,) = attention.rows(name, [point])
    positions = geometry.query_positions([point])
    query = replace(geometry, target_stride=geometry.stride).target_points(positions)[0].tolist()
    ((x, y, weight),) = geometry.strongest(row, 1)
    padding = 100 * geometry.padding_share(row[None]).item()
    return (*query, float(f"{weight:.3g}"), x, y, padding)


def on_screen(page, x, y):
    """Return the position of a point of the image in the window."""
    box = page.locator("#stage").bounding_box()
    scale = box["width"] / IMAGE_SIZE[1]
    return box["x"] + x * scale, box["y"] + y * scale


def assert_shows(page, attention, name, point):
    assert readout(page) == pytest.approx(expected(attention, name, point), abs=0.051, rel=1e-9)


POINTS = [(4.0, 5.0), (100.5, 40.0), (331.0, 95.0), (250.0, 1.0), (166.0, 60.0)]


@needs_chromium
def test_readout_follows_the_pointer(open_page, attention):
    page = open_page()
    assert_shows(page, attention, "res3.1", (230.0, 40.0))  # the centre of the first detection
    for name in ("res3.1", "res4.1", "res3.1"):
        choose(page, name)
        for point in POINTS:
            page.mouse.move(*on_screen(page, *point))
            assert_shows(page, attention, name, point)
            (row,) = attention.rows(name, [point])
            strongest = attention.geometry[name].strongest(row, STRONGEST)
            cells = page.locator("#strongest tr td:nth-child(2)").all_inner_texts()
            weights = [float(cell.replace("\N{MINUS SIGN}", "-")) for cell in cells]
            assert weights == [float(f"{weight:.3g}") for _, _, weight in strongest]
        assert ("\N{MINUS SIGN}" in page.inner_text("#ticks")) == (name == "res4.1")


@needs_chromium
@pytest.mark.parametrize("name", ["res3.1", "res4.1"])
def test_map_covers_the_targets(open_page, attention, name):
    page = open_page()
    choose(page, name)
    page.mouse.move(*on_screen(page, 100.5, 40.0))
    geometry = attention.geometry[name]
    rows, columns = geometry.in_image().nonzero().amax(0).add(1).tolist()
    pixels = page.evaluate(
        "() => [...heat.getContext('2d').getImageData(0, 0, heat.width, heat.height).data]"
    )
    weights = attention.rows(name, [(100.5, 40.0)])[0, :rows, :columns].abs()
    levels = (LEVELS * (weights / weights.max()).sqrt()).round()
    alpha = torch.tensor(pixels).reshape(rows, columns, 4)[..., 3]
    assert torch.equal(alpha, (255 * levels / LEVELS + 0.5).floor().long())
    stage, heat = (page.locator(id).bounding_box() for id in ("#stage", "#heat"))
    assert (heat["x"], heat["y"]) == (stage["x"], stage["y"])
    for key, count, resized in (("width", columns, 501), ("height", rows, 146)):
        side = geometry.target_stride * stage[key] / resized
        assert heat[key] == pytest.approx(side * count, abs=0.1)


@needs_chromium
def test_keyboard(open_page, attention):
    page = open_page()
    page.keyboard.press("Tab")
    x, y, side = 230.0, 40.0, 16 * 333 / 501
    for key, right, down in [
        ("ArrowRight", 1, 0),
        ("ArrowUp", 0, -1),
        ("Shift+ArrowLeft", -5, 0),
        ("ArrowDown", 0, 1),
    ]:
        page.keyboard.press(key)
        x, y = x + right * side, y + down * side
        assert_shows(page, attention, "res3.1", (x, y))
    for _ in range(3):
        page.keyboard.press("Shift+ArrowDown")  # stops at the edge
    assert_shows(page, attention, "res3.1", (x, 96.9))
    assert page.evaluate("scrollY") == 0


@needs_chromium
def test_touch_on_a_phone(open_page, attention):
    page = open_page(width=375, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.locator("#stage").scroll_into_view_if_needed()
    for point in POINTS[1:3]:
        page.touchscreen.tap(*on_screen(page, *point))
        assert_shows(page, attention, "res3.1", point)


@needs_chromium
def test_click_holds_the_query(open_page, attention):
    page = open_page()
    page.mouse.click(*on_screen(page, *POINTS[1]))
    page.mouse.move(*on_screen(page, *POINTS[2]))
    assert_shows(page, attention, "res3.1", POINTS[1])
    page.mouse.click(*on_screen(page, *POINTS[2]))
    page.mouse.move(*on_screen(page, *POINTS[3]))
    assert_shows(page, attention, "res3.1", POINTS[3])


@needs_chromium
def test_controls(open_page):
    page = open_page()
    assert page.locator(".arrow").count() == STRONGEST
    page.locator("#arrows").fill("3")
    assert page.locator(".arrow").count() == 3
    assert page.locator(".box").count() == 0
    page.check("#detections")
    assert page.locator(".box text").all_text_contents() == ["class 1 99%", "class 0 50%"]
    page.locator("#opacity").fill("0.25")
    assert page.evaluate("getComputedStyle(heat).opacity") == "0.25"


@needs_chromium
def test_message_in_an_old_browser(open_page):
    page = open_page(script="delete window.DecompressionStream")
    assert "This browser cannot unpack the maps" in page.inner_text("#readout")
