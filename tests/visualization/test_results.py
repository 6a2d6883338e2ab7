"""Two runs side by side: the order of the images, the drawings, and the page."""

import json

import numpy as np
import pytest
import show_results as tool
from detectron2.data import Metadata
from PIL import Image
from pycocotools import mask

from nl_detectron.evaluation.coco_results import read_annotations
from nl_detectron.visualization.predictions import MIN_SIDE
from nl_detectron.visualization.results import _arrange, draw_objects, rank, summarize

HEIGHT, WIDTH = 100, 160
GREY = 90
LEFT, RIGHT = [10, 20, 40, 40], [100, 20, 40, 40]
WIDER = [10, 20, 40, 52]  # IoU with LEFT: 40 / 52, above 6 of the 10 thresholds


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
    """Images 1 and 2 have two objects, 3 has a crowd, 4 and 5 have none."""
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
    detection(3, 1, LEFT),  # a crowd does not count
    detection(4, 2, RIGHT),  # there is no object
]
B = [
    detection(1, 1, LEFT, 0.6),
    detection(1, 2, RIGHT),
    detection(2, 1, LEFT),
    detection(2, 2, RIGHT, 0.7),
    detection(2, 2, RIGHT, 0.6),  # a duplicate
]


def test_order(data):
    ranked = rank(data, A, B, "bbox")
    assert [image["id"] for image, _, _ in ranked] == [4, 1, 2, 3, 5]
    assert [image["id"] for image, _, _ in rank(data, B, A, "bbox")] == [4, 1, 2, 3, 5]
    assert [b - a for _, a, b in ranked] == pytest.approx([1, 0.5, 0.4, 0, 0])
    assert summarize(ranked, ["A", "B"]) == (
        "Of 5 images, B is better on 3, A on 0; on 2 they are equal."
    )


@pytest.mark.parametrize("colours", [[(250, 0, 0), (0, 0, 250)], [], [(250, 0, 0)]])
def test_drawing(data, colours):
    """Each object has the colour of its class, in an enlarged image."""
    image = np.full((HEIGHT, WIDTH, 3), GREY, dtype=np.uint8)

    def draw(objects):
        return draw_objects(image, objects, data.cats, Metadata(thing_colors=colours))

    plain = draw([])
    scale = MIN_SIDE // WIDTH
    assert plain.shape == (HEIGHT * scale, WIDTH * scale, 3) and (plain == GREY).all()
    first = draw(data.imgToAnns[1])
    left, right = first[160, 160], first[160, 480]  # inside the two objects
    assert (first[160, 320] == GREY).all()  # between them
    if len(colours) == 2:
        assert left[0] > left[2] and right[2] > right[0]
    assert np.abs(left.astype(int) - right).max() > 20
    second = draw([detection(1, 2, LEFT), detection(1, 1, RIGHT)])
    assert np.array_equal(second[160, 160], right) and np.array_equal(second[160, 480], left)


def test_boxes_and_keypoints_without_masks(data):
    image = np.full((HEIGHT, WIDTH, 3), GREY, dtype=np.uint8)
    person = {"category_id": 1, "bbox": LEFT}
    drawn = draw_objects(image, [person], data.cats, Metadata())
    assert (drawn[160, 40] != GREY).any() and (drawn[280, 160] == GREY).all()
    person["keypoints"] = [80.0, 50.0, 2.0]
    drawn = draw_objects(image, [person], data.cats, Metadata())
    assert (drawn[200, 320] != GREY).any()


@pytest.mark.parametrize("size, shape", [((60, 100), (1, 3)), ((40, 100), (3, 1))])
def test_arrangement(size, shape):
    """Panels are side by side; wide ones are in a column."""
    panels = {str(n): np.full((*size, 3), 40 * n, dtype=np.uint8) for n in (1, 2, 3)}
    figure = _arrange(panels)
    assert figure.axes[0].get_gridspec().get_geometry() == shape
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["1", "2", "3"]


@pytest.fixture
def arguments(data, tmp_path, monkeypatch):
    """Return arguments of the command: the folder of a run, and a file."""
    folder = tmp_path / "baseline" / "seed1" / "inference"
    folder.mkdir(parents=True)
    (folder / "coco_instances_results.json").write_text(json.dumps(A))
    doubtful = [detection(4, 1, LEFT, 0.4)]
    (tmp_path / "nl&.json").write_text(json.dumps(B + doubtful))
    monkeypatch.chdir(tmp_path)
    truth = ["--annotations", "annotations.json", "--images", "images", "--output", "out"]
    return ["baseline/seed1", "nl&.json", *truth]


def test_command(arguments, tmp_path, capsys):
    tool.main([*arguments, "--count", "3"])
    assert "nl&.json is better on 3, baseline on 0; on 2 they are equal" in capsys.readouterr().out
    names = ["1_4.png", "2_1.png", "3_2.png", "index.html"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name in names[:3]:
        width, height = Image.open(tmp_path / "out" / name).size
        assert width > 3 * MIN_SIDE and height > 400
    page = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert [page.count(f'src="{name}"') for name in names[:3]] == [1, 1, 1]
    assert "<title>baseline and nl&amp;.json</title>" in page
    assert "1. 4.png: F1 +1.00" in page


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda arguments: [*arguments, "--confidence-threshold", "0.95"], "no score reaches"),
        (lambda arguments: ["nowhere.json", *arguments[1:]], "nowhere.json"),
        (lambda arguments: ["images", *arguments[1:]], "coco_instances_results.json"),
        (lambda arguments: [*arguments[:2], "--dataset", "nowhere"], "'nowhere'"),
        (lambda arguments: [*arguments, "--images", "nowhere"], "nowhere/4.png cannot be read"),
        (lambda arguments: arguments[:4], "--annotations and --images"),
    ],
)
def test_bad_arguments(arguments, capsys, change, message):
    with pytest.raises(SystemExit) as end:
        tool.main(change(arguments))
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error and message in error
