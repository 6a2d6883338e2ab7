"""Two runs side by side: the order of the images, the drawings, and the page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import show_results as tool
from detectron2.data import Metadata
from PIL import Image
from pycocotools import mask

from nl_detectron.visualization.figure import draw_objects

HEIGHT, WIDTH, GREY = 100, 160, 90
LEFT, RIGHT = [10, 20, 40, 40], [100, 20, 40, 40]
WIDER = [10, 20, 40, 52]  # IoU with LEFT: 40 / 52, above 6 of the 10 thresholds


def instance(image, category, box, **fields):
    x, y, w, h = box
    (rle,) = mask.frPyObjects(np.array([box], dtype=float), HEIGHT, WIDTH)
    fields |= {"image_id": image, "category_id": category, "bbox": box, "area": w * h}
    return fields | {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}


A = [
    instance(1, 1, LEFT, score=0.9),  # a hit
    instance(1, 1, RIGHT, score=0.9),  # the wrong class
    instance(2, 1, WIDER, score=0.9),
    instance(3, 1, LEFT, score=0.9),  # a crowd does not count
    instance(4, 2, RIGHT, score=0.9),  # there is no object
]
B = [
    instance(1, 1, LEFT, score=0.6),
    instance(1, 2, RIGHT, score=0.9),
    instance(2, 1, LEFT, score=0.9),
    instance(2, 2, RIGHT, score=0.7),
    instance(2, 2, RIGHT, score=0.6),  # a duplicate
]


def test_drawing():
    """Each object has the colour of its class, in an enlarged image."""

    def draw(*objects):
        image = np.full((HEIGHT, WIDTH, 3), GREY, dtype=np.uint8)
        metadata = Metadata(thing_colors=[(250, 0, 0), (0, 0, 250)])
        return draw_objects(image, objects, {1: "cat", 2: "dog"}, metadata)

    first = draw(instance(1, 1, LEFT), instance(1, 2, RIGHT))
    left, right = first[160, 160], first[160, 480]  # inside the two objects
    assert first.shape == (400, 640, 3) and (first[160, 320] == GREY).all()  # between them
    assert left[0] > left[2] and right[2] > right[0]
    second = draw(instance(1, 2, LEFT, score=1), instance(1, 1, RIGHT, score=1))
    assert np.array_equal(second[160, 160], right) and np.array_equal(second[160, 480], left)
    third = draw({"category_id": 1, "bbox": LEFT, "keypoints": [80.0, 50.0, 2.0]})
    assert (third[200, 320] != GREY).any()


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Return arguments of the command: the folder of a run, and a file.

    Images 1 and 2 have two objects, 3 has a crowd, 4 and 5 have none.
    """
    monkeypatch.chdir(tmp_path)
    objects = [(1, 1, LEFT), (1, 2, RIGHT), (2, 1, LEFT), (2, 2, RIGHT), (3, 1, LEFT)]
    objects = [instance(*thing, id=i, iscrowd=i // 5) for i, thing in enumerate(objects, start=1)]
    for number in range(1, 6):
        Image.new("RGB", (WIDTH, HEIGHT), (GREY,) * 3).save(f"{number}.png")
    size = {"height": HEIGHT, "width": WIDTH}
    images = [{"id": number, "file_name": f"{number}.png"} | size for number in range(1, 6)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    dataset = {"images": images, "annotations": objects, "categories": categories}
    folder = tmp_path / "baseline" / "seed1" / "inference"
    folder.mkdir(parents=True)
    Path("gt.json").write_text(json.dumps(dataset))
    (folder / tool.RESULTS).write_text(json.dumps(A))
    Path("nl&.json").write_text(json.dumps([*B, instance(4, 1, LEFT, score=0.4)]))
    return "baseline/seed1 nl&.json --annotations gt.json --images . --output out".split()


def test_command(arguments, capsys):
    tool.main([*arguments, "--count", "3"])
    assert "nl&.json is better on 3, baseline on 0; on 2 they are equal" in capsys.readouterr().out
    assert Image.open("out/1_4.png").width > 3 * 640
    page = Path("out/index.html").read_text("utf-8")
    assert "<title>baseline and nl&amp;.json</title>" in page
    assert re.findall(r'<h2>(.*)</h2><img src="(.*?)"', page) == [
        ("1. 4.png: F1 +1.00", "1_4.png"),
        ("2. 1.png: F1 +0.50", "2_1.png"),
        ("3. 2.png: F1 +0.40", "3_2.png"),
    ]


def test_masks_and_the_same_detections(arguments, tmp_path, capsys):
    """``--tasks`` selects what is scored; several test datasets have a folder each."""
    folder = tmp_path / "several" / "inference" / "data"
    folder.mkdir(parents=True)
    (folder / tool.RESULTS).write_text("")
    assert tool.results_file(tmp_path / "several", "data") == folder / tool.RESULTS
    shifted = [d | {"bbox": [0, 0, 9, 9]} for d in A]  # only the boxes are wrong
    for content, options in ((shifted, ["--tasks", "segm"]), (A, [])):
        (tmp_path / "a.json").write_text(json.dumps(content))
        tool.main([*arguments[:1], "a.json", *arguments[2:], "--count", "1", *options])
        out, err = capsys.readouterr()
        assert "on 5 they are equal" in out
        assert ("have the same detections" in err) == (content is A)


def test_bad_arguments(arguments, capsys):
    for changed, message in [
        ([*arguments, "--confidence-threshold", "0.95"], "no score reaches"),
        ([*arguments, "--dataset", "data"], "--annotations and --images"),
        (["nl&.json", *arguments[1:]], "A and B are the same run"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            tool.main(changed)
        assert message in capsys.readouterr().err.splitlines()[-1]
