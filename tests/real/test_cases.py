"""Files as exporters really write them: the check, the start of training, reading, the repair."""

import json
import os
import re
import unicodedata
from pathlib import Path

import check_dataset
import pytest
from helpers import TINY
from PIL import Image

from nl_detectron.data.annotations import decode, normalise, read_annotations, read_for_evaluation
from nl_detectron.data.coco import NAMES, overrides, read_datasets
from nl_detectron.engine import argument_parser, load_config, main
from nl_detectron.engine.checks import check_input
from nl_detectron.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.getenv("NL_SHARED", REPOSITORY.parent / "shared"))
CASES = SHARED / "cases"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CASES.is_dir(), reason=f"no folder {CASES}; set NL_SHARED"),
]

# What is said of each file with an error.
ALL, AREA = "17 of 17", "17 of 17 areas differ by more than a factor of 2"
IMAGE_ID = "{0} of {0} images have a value of 'id' that is not an integer below 2"
VALUE = "17 of 17 annotations have a value of '{}' that is not .*annotations.0., id 1: {}"
ERRORS = {
    **dict.fromkeys(["text_ids", "ids_timestamp", "ids_60bit", "ids_128bit"], IMAGE_ID.format(6)),
    **dict.fromkeys(["ids_collide", "ids_collide2"], IMAGE_ID.format(4)),
    "boxes_not_of_polygons": f"{ALL} boxes do not fit .*cause: they were not computed from",
    "xyxy": f"{ALL} boxes do not fit their mask.*likely cause: they are x1, y1, x2, y2",
    **dict.fromkeys(["normalised", "normalised_polygon"], f"{ALL} boxes or masks are from 0 to 1"),
    "polygon_of_larger_image": f"{ALL} boxes or masks .* outside .*: .* image size, 4 x 4 times",
    "polygon_negative": f"{ALL} boxes or masks .* outside of their image.*cause: they are negative",
    "kp_dupnames": "2 of 3 keypoint names repeat an earlier name of the same category: point",
    "kp_v0": f"{ALL} annotations have only keypoints of visibility 0",
    "kp_num_null": VALUE.format("num_keypoints", "null"),
    "iscrowd_null": VALUE.format("iscrowd", "null"),
    "iscrowd_null_half": "8 of 17 annotations .* 'iscrowd' .*annotations.1., id 2: null",
    "iscrowd_text0": VALUE.format("iscrowd", '"0"'),
    "iscrowd_false": VALUE.format("iscrowd", "false"),
    "area_text": VALUE.format("area", '"1848"'),
    "area_null": VALUE.format("area", "null"),
    "area_nan": VALUE.format("area", "NaN"),
    **dict.fromkeys(["area_zero", "kp_area0"], AREA),
    "gbk": "is not JSON in UTF-8 or UTF-16",
    "via_text_image_id": '17 of 17 annotations .* .image_id. .*annotations.0., .*: "0"',
    "via_one_good": '16 of 17 annotations .* .image_id. .*annotations.1., .*: "0"',
    "via_flat": f"{ALL} segmentations are neither a list of polygons nor an RLE.*"
    "likely cause: an unknown form; the first is \\[45.72, 42.59",
    "via_categories_repeated": "12 of 41 ids repeat an earlier id of the same list: categories 1",
    "crowd_missing_mask": "1 of 18 annotations have no segmentation .*: 900 .000001.jpg",
    "one_empty_segmentation": "1 of 17 annotations have no segmentation .*: 1 .000001.jpg",
}
NOSE = "1 of 3 keypoint names have no left or right partner, .*: (?i:nose)"
SIDES = ["L_R", "Left_Right", "UPPER", "suffix", "camel", "left_right"]
NOTES = {
    **dict.fromkeys(["base", "bom", "float_size", "nfd", "backslash", "same_names", "chinese"], ""),
    **{f"kp_{name}": NOSE for name in SIDES},
    "cvat_brush": "8 of 17 annotations are crowds .iscrowd 1.: not trained on and not scored",
    "dense": "1 of 1 images have more .*TEST.DETECTIONS_PER_IMAGE.*: 000001.jpg .300.",
}
# Errors that have no single right repair.
NOT_FIXED = {"polygon_of_larger_image", "polygon_negative", "kp_dupnames", "kp_v0", "gbk"}
NOT_FIXED |= {"crowd_missing_mask", "one_empty_segmentation"}
COPIED = {"bom", "float_size", "nfd", "backslash"}


@pytest.fixture
def files(tmp_path):
    """Return the paths of a case and of a new folder with its images."""

    def prepare(case):
        path = CASES / f"{case}.json"
        if case != "gbk":
            data, _ = decode(path)
            normalise(data)
            for image in data["images"]:
                # On disk, in the other Unicode form than in the annotations.
                name = image["file_name"]
                form = "NFD" if unicodedata.is_normalized("NFC", name) else "NFC"
                file = tmp_path / unicodedata.normalize(form, name)
                file.parent.mkdir(exist_ok=True)
                Image.new("RGB", (image["width"], image["height"])).save(file)
        return str(path), str(tmp_path)

    return prepare


def check(path, folder, *flags):
    try:
        return check_dataset.main(["--json", path, "--images", folder, *flags])
    except SystemExit as error:
        return error.code


def start(path, folder, *flags, keypoints=False):
    """Do what train_net.py does before it builds the model; return config and datasets."""
    flags = [*flags, "--num-gpus", "0", "--test-json", path, "--test-images", folder]
    if "--eval-only" not in flags:
        flags += ["--train-json", path, "--train-images", folder]
    args = argument_parser().parse_args(flags)
    datasets = read_datasets(args)
    options = ["OUTPUT_DIR", f"{folder}/out", *overrides(datasets)]
    if keypoints:
        options += ["MODEL.KEYPOINT_ON", True, "TEST.KEYPOINT_OKS_SIGMAS", [0.1] * 3]
    cfg = load_config(TINY, options)
    for dataset in datasets.values():
        dataset.register()
    return cfg, check_input(cfg, args, list(datasets.values()))


@pytest.mark.parametrize("case", ERRORS)
def test_errors(files, capsys, case):
    path, folder = files(case)
    assert check(path, folder) == (2 if case == "gbk" else 1)
    output = "".join(capsys.readouterr())
    assert re.search(f"(?m)^error: .*{ERRORS[case]}", output), output

    has_keypoints = case.startswith("kp_")
    for flags in ([], ["--eval-only"]):
        with pytest.raises(UserError, match=ERRORS[case]) as error:
            start(path, folder, *flags, keypoints=has_keypoints)
        assert case == "gbk" or f"tools/check_dataset.py --json {path} --fix" in str(error.value)
    with pytest.raises(UserError, match=ERRORS[case]):
        read_for_evaluation(path, masks=True, keypoints=has_keypoints)


@pytest.mark.parametrize("case", NOTES)
def test_notes(files, capsys, case):
    path, folder = files(case)
    before = Path(path).read_bytes()
    assert check(path, folder) == 0
    assert re.search(NOTES[case], capsys.readouterr().out)
    has_keypoints = case.startswith("kp_")
    _, datasets = start(path, folder, keypoints=has_keypoints)
    note = "images have up to 300 objects" if case == "dense" else NOTES[case]
    assert re.search(note, capsys.readouterr().err)
    for dataset in datasets:
        assert (dataset.json_file != path) == (case in COPIED)
        assert dataset.flip_map == [tuple(dataset.keypoints[:2])] * has_keypoints
    data = read_for_evaluation(path, masks=True, keypoints=has_keypoints)
    assert data == read_annotations(path) and Path(path).read_bytes() == before


@pytest.mark.parametrize("case", {**ERRORS, **NOTES})
def test_repair(files, capsys, case):
    path, folder = files(case)
    fixed = f"{folder}/fixed.json"
    status = check(path, folder, "--fix", fixed, *["--no-crowd"] * (case == "cvat_brush"))
    assert (status != 0) == (case in NOT_FIXED), capsys.readouterr()
    if status == 0:
        data = read_for_evaluation(fixed, masks=True, keypoints=case.startswith("kp_"))
        assert not any(annotation["iscrowd"] for annotation in data["annotations"])
        if "id" in case and "iscrowd" not in case:
            for image, old in zip(data["images"], json.loads(Path(path).read_text())["images"]):
                assert old["id"] in (image["id"], image.get("original_id"))


@pytest.mark.parametrize("case", [*sorted(COPIED), "same_names", "chinese"])
def test_training_and_evaluation(files, case):
    path, folder = files(case)
    flags = ["--config-file", TINY, "--num-gpus", "0", "OUTPUT_DIR", f"{folder}/o"]
    for split in NAMES:
        flags[:0] = [f"--{split}-json", path, f"--{split}-images", folder]
    main(argument_parser().parse_args([*flags, "SOLVER.MAX_ITER", "1"]))
    metrics = json.loads(Path(f"{folder}/o/metrics.json").read_text().splitlines()[-1])
    assert "bbox/AP" in metrics and "segm/AP" in metrics
