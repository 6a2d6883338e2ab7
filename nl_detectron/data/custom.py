"""One's own data in COCO's format, as a dataset of detectron2."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .check import Problem, Problems, check_annotations, read_coco
from .check_images import missing_images


@dataclass(frozen=True)
class CustomDataset:
    """What has to be known of a dataset before it is trained on. It can be sent to processes.

    Attributes:
        name: to register it under.
        json_file: the annotations.
        image_root: the folder that the file names in it are relative to.
        classes: names of the categories, in the order of their ids, as detectron2 numbers them.
        keypoints: their names, if every category lists the same; otherwise empty.
        problems: what is wrong with it, as far as it shows without opening an image.
    """

    name: str
    json_file: str
    image_root: str
    classes: list[str]
    keypoints: list[str]
    problems: Problems

    @classmethod
    def read(cls, name: str, json_file: str, image_root: str) -> "CustomDataset":
        """Read the annotations once and keep the little that matters.

        Raises:
            FileNotFoundError: the file or the folder is not there.
            ValueError: the file is not in COCO's format.
        """
        data = read_coco(json_file)
        problems = check_annotations(data)
        classes, keypoints = [], []
        if Problem.INCOMPLETE not in problems:
            if missing := missing_images(data, image_root):
                problems[Problem.FILE_MISSING] = missing
            categories = sorted(data["categories"], key=lambda category: category["id"])
            classes = [category["name"] for category in categories]
            lists = [category.get("keypoints", []) for category in categories]
            keypoints = lists[0] if lists == lists[:1] * len(lists) else []
        return cls(name, json_file, image_root, classes, keypoints, problems)

    def register(self) -> None:
        """Register it with detectron2, in place of what had the name before.

        Every process has its own catalogue, so each one that uses the data has to call this.
        """
        DatasetCatalog.pop(self.name, None)
        MetadataCatalog.pop(self.name, None)
        DatasetCatalog.register(
            self.name, partial(load_coco_json, self.json_file, self.image_root, self.name)
        )
        metadata = MetadataCatalog.get(self.name)
        metadata.set(
            json_file=self.json_file,
            image_root=self.image_root,
            evaluator_type="coco",
            thing_classes=self.classes,
        )
        if self.keypoints:
            metadata.set(keypoint_names=self.keypoints, keypoint_flip_map=flip_map(self.keypoints))


def flip_map(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of keypoints that a horizontal flip exchanges: those that differ in left and right."""
    pairs = [(name, name.replace("left", "right")) for name in names if "left" in name]
    return [pair for pair in pairs if pair[1] in names]
