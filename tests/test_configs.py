"""The shipped configs."""

from pathlib import Path

import detectron2
import pytest
from detectron2.config import get_cfg

from nl_detectron import get_config_file
from nl_detectron.engine import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Not by detectron2.model_zoo, which upstream cannot be imported without pkg_resources.
ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
BASELINE = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


@pytest.mark.parametrize(
    "name", sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml"))
)
def test_every_config_loads(name):
    path = get_config_file(name)
    assert Path(path) == CONFIGS / name
    assert load_config(path).VERSION == 2


@pytest.mark.parametrize("name", ["Base-RCNN-FPN.yaml", BASELINE])
def test_baseline_is_the_zoos(name):
    ours, zoo = get_cfg(), get_cfg()
    ours.merge_from_file(get_config_file(name))
    zoo.merge_from_file(str(ZOO / name))
    assert ours == zoo
    assert ours != get_cfg()


def test_nonlocal_config_differs_from_the_baseline_in_the_backbone_only():
    baseline = load_config(get_config_file(BASELINE))
    nonlocal_ = load_config(get_config_file(BASELINE.replace("_1x", "_NL_1x"))).clone()
    assert nonlocal_.MODEL.BACKBONE.NAME == "build_nonlocal_backbone"
    nonlocal_.defrost()
    nonlocal_.MODEL.BACKBONE.NAME = baseline.MODEL.BACKBONE.NAME
    assert nonlocal_ == baseline
    assert baseline.MODEL.NONLOCAL.BACKBONE == baseline.MODEL.BACKBONE.NAME
    assert baseline.MODEL.NONLOCAL.LOCATION == ("res4.-2",)


def test_unknown_config_is_answered_with_those_that_there_are():
    with pytest.raises(FileNotFoundError, match="'mask_rcnn.yaml'.*Base-RCNN-FPN.yaml, COCO-Inst"):
        get_config_file("mask_rcnn.yaml")
