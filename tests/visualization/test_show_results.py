"""Two runs side by side: the scores and the order of images, the drawings, and the page."""

import copy
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import show_results as tool
from detectron2.data import Metadata
from nl_detectron.evaluation.coco_files import read_annotations
from nl_detectron.evaluation.image_scores import image_scores
from PIL import Image
from pycocotools import mask

from nl_detectron.visualization.images import MIN_SIDE
from nl_detectron.visualization.results import Painter, arrange, rank
from nl_detectron.visualization.results_page import Panel, Section, page

HEIGHT, WIDTH = 100, 160
GREY = 90
LEFT, RIGHT = [10, 20, 40, 40], [100, 20, 40, 40]
WIDER = [10, 20, 40, 52]  # its IoU with LEFT is 40/52, above 6 of the 10 thresholds


def rectangle(box):
    x, y, w, h = box
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    pixels[y : y + h, x : x + w] = 1
    encoded = mask.encode(pixels)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def entry(image, category, box, **more):
    entry = {"image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
    return entry | {"segmentation": rectangle(box)} | more


def detection(image, category, box, score=0.9):
    return entry(image, category, box, score=score)


@pytest.fixture
def data(tmp_path):
    """Annotations and images: 1 and 2 have two objects, 3 has a crowd, 4 and 5 have nothing."""
    objects = [
        (1, 1, LEFT, 0),
        (1, 2, RIGHT, 0),
        (2, 1, LEFT, 0),
        (2, 2, RIGHT, 0),
        (3, 1, LEFT, 1),
    ]
    annotations = [
        entry(image, category, box, id=number, iscrowd=crowd)
        for number, (image, category, box, crowd) in enumerate(objects, start=1)
    ]
    (tmp_path / "images").mkdir()
    images = []
    for number in range(1, 6):
        pixels = np.full((HEIGHT, WIDTH, 3), GREY, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        size = {"height": HEIGHT, "width": WIDTH}
        images.append({"id": number, "file_name": f"{number}.png"} | size)
    categories = [{"id": 1, "name": "<cat>"}, {"id": 2, "name": "dog"}]
    dataset = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations.json").write_text(json.dumps(dataset))
    return read_annotations(tmp_path / "annotations.json")


A = [
    detection(1, 1, LEFT),  # a hit
    detection(1, 1, RIGHT),  # the wrong class
    detection(2, 1, WIDER),
    detection(3, 1, LEFT),  # a crowd: does not count
    detection(4, 2, RIGHT),  # nothing is there
]
B = [
    detection(1, 1, LEFT, 0.6),
    detection(1, 2, RIGHT),
    detection(2, 1, LEFT),
    detection(2, 2, RIGHT, 0.7),
    detection(2, 2, RIGHT, 0.6),  # a second time
]


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_scores(data, task):
    scores = [image_scores(data, copy.deepcopy(run), task) for run in (A, B)]
    # Hits, and twice as many over detections and objects together.
    wider = 0.6 * 2 * 1 / (1 + 2)
    assert scores[0] == pytest.approx([2 / 4, wider, 1, 0, 1])
    assert scores[1] == pytest.approx([1, 4 / 5, 1, 1, 1])


def test_order(data):
    pairs = rank(data, A, B, "bbox")
    assert [pair.image["id"] for pair in pairs] == [4, 1, 2, 3, 5]
    # Exchanged, they differ as much.
    assert [pair.image["id"] for pair in rank(data, B, A, "bbox")] == [4, 1, 2, 3, 5]
    assert [pair.difference for pair in pairs] == pytest.approx([1, 0.5, 0.4, 0, 0])


@pytest.mark.parametrize("colours", [[(250, 0, 0), (0, 0, 250)], None, [(250, 0, 0)]])
def test_drawing(data, tmp_path, colours):
    """Objects have the colour of their class, at their place, in an image made large enough."""
    metadata = Metadata(thing_colors=colours) if colours else None
    painter = Painter(data, tmp_path / "images", metadata)
    image = data.imgs[1]
    plain = painter.draw(image, [])
    scale = MIN_SIDE // WIDTH
    assert plain.shape == (HEIGHT * scale, WIDTH * scale, 3) and (plain == GREY).all()

    first = painter.draw(image, painter.objects(1))
    left, right = first[160, 160], first[160, 480]  # inside of the two
    assert (first[160, 320] == GREY).all()  # between them
    if colours and len(colours) == 2:
        assert left[0] > left[2] and right[2] > right[0]
    assert np.abs(left.astype(int) - right).max() > 20
    second = painter.draw(image, [detection(1, 2, LEFT), detection(1, 1, RIGHT)])
    assert np.array_equal(second[160, 160], right) and np.array_equal(second[160, 480], left)


def test_labels(data, tmp_path):
    painter = Painter(data, tmp_path)
    instances = [*painter.objects(1), *painter.objects(3), detection(1, 2, LEFT, 0.875)]
    assert [painter.label(i) for i in instances] == ["<cat>", "dog", "<cat> (crowd)", "dog 88%"]
    assert painter.objects(5) == []


def test_keypoints_and_boxes_alone_are_drawn(data, tmp_path):
    painter = Painter(data, tmp_path / "images")
    person = {"category_id": 1, "keypoints": [80.0, 50.0, 2.0]}
    drawn = painter.draw(data.imgs[1], [person])
    assert (drawn[200, 320] != GREY).any() and (drawn[100, 100] == GREY).all()
    drawn = painter.draw(data.imgs[1], [{"category_id": 1, "bbox": LEFT}])
    assert (drawn[160, 40] != GREY).any() and (drawn[280, 160] == GREY).all()


def test_an_image_that_cannot_be_read(data, tmp_path):
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(OSError, match="images/1.png cannot be read"):
        Painter(data, tmp_path / "images").draw(data.imgs[1], [])


@pytest.mark.parametrize("size, expected", [((60, 100), (316, 88)), ((40, 100), (100, 220))])
def test_arrangement(size, expected):
    """Side by side, and wide pictures one below the other."""
    panels = {str(n): np.full((*size, 3), 40 * n, dtype=np.uint8) for n in (1, 2, 3)}
    sheet = arrange(panels)
    assert sheet.size == expected
    corners = [(0, 28), (108, 28), (216, 28)] if size[0] == 60 else [(0, 28), (0, 104), (0, 180)]
    assert [sheet.getpixel(corner) for corner in corners] == [(v, v, v) for v in (40, 80, 120)]


class Reader(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag, attribute):
        return [attributes.get(attribute) for name, attributes in self.tags if name == tag]


def test_page():
    picture = np.zeros((4, 8, 3), dtype=np.uint8)
    panels = [Panel(picture, "a < b & c", 'say "<b>"')] * 2
    reader = Reader(page("x & y", "<summary>", [Section("<title>", "$note", panels)]))
    for text in ("x & y", "<summary>", "<title>", "$note", "a < b & c"):
        assert text in reader.text
    assert reader.all("img", "alt") == ['say "<b>"'] * 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in reader.all("img", "src"))
    assert reader.all("img", "width") == ["8", "8"]
    assert not {"script", "link", "iframe"} & {tag for tag, _ in reader.tags}


def show_results(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["show_results.py", *map(str, arguments)])
    tool.main()


@pytest.fixture
def arguments(data, tmp_path, monkeypatch):
    """Of the command: a run's folder and a file."""
    folder = tmp_path / "baseline" / "seed1" / "inference"
    folder.mkdir(parents=True)
    (folder / "coco_instances_results.json").write_text(json.dumps(A))
    doubtful = [detection(4, 1, LEFT, 0.4)]
    (tmp_path / "nl.json").write_text(json.dumps(B + doubtful))
    monkeypatch.chdir(tmp_path)
    truth = ["--annotations", "annotations.json", "--images", "images", "--output", "out"]
    return ["baseline/seed1", "nl.json", *truth]


def test_command(arguments, tmp_path, monkeypatch, capsys):
    show_results(monkeypatch, *arguments, "--count", "3")
    assert "nl.json is better on 3, baseline on 0; on 2 they are equal" in capsys.readouterr().out
    names = ["1_4.png", "2_1.png", "3_2.png", "index.html"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names[:3]:
        assert Image.open(tmp_path / "out" / name).size == (3 * MIN_SIDE + 16, 400 + 28)
    reader = Reader((tmp_path / "out" / "index.html").read_text("utf-8"))
    assert reader.all("img", "alt") == [
        *("nothing", "dog 90%", "nothing"),  # the doubtful one is not there
        *("<cat>, dog", "<cat> 90%, <cat> 90%", "<cat> 60%, dog 90%"),
        *("<cat>, dog", "<cat> 90%", "<cat> 90%, dog 70%, dog 60%"),
    ]
    assert "baseline, F1 0.50" in reader.text and "nl.json, F1 1.00" in reader.text


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda arguments: [*arguments, "--confidence-threshold", "0.95"], "no score is 0.95"),
        (lambda arguments: ["nowhere.json", *arguments[1:]], "no file .*nowhere.json"),
        (lambda arguments: ["images", *arguments[1:]], "no file .*coco_instances_results.json"),
        (lambda arguments: [*arguments[:2], "--dataset", "nowhere"], "no dataset 'nowhere'"),
        (lambda arguments: [*arguments, "--images", "nowhere"], "no folder nowhere"),
    ],
)
def test_bad_arguments(arguments, monkeypatch, capsys, spoil, message):
    with pytest.raises(SystemExit) as exit_info:
        show_results(monkeypatch, *spoil(arguments))
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and re.search(message, line)
