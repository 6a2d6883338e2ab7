"""The detection tables of the paper and the configs that reproduce them.

All numbers are from Tables 5 and 6 of Wang, Girshick, Gupta, He, "Non-local Neural Networks",
CVPR 2018 (https://arxiv.org/abs/1711.07971): percent, on COCO val2017.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from ..errors import UserError


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: part of the config's name, unique in the table.
        baseline: name of the row to compare with; None for a baseline.
        paper: the paper's values of the table's metrics; empty if the paper has none.
    """

    name: str
    baseline: Optional[str] = None
    paper: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows that are reported together.

    Attributes:
        title: heading of the table.
        configs: pattern of the config names, with ``{}`` in place of the row's name.
        metrics: keys of metrics.json.
        rows: baselines come before the rows that are compared with them.
        image_size: height and width in pixels for which multiply-adds are counted.
    """

    title: str
    configs: str
    metrics: tuple[str, ...]
    rows: list[Row]
    image_size: tuple[int, int] = (800, 1344)

    def config(self, row: Row) -> str:
        """Return the name of a row's config, as ``get_config_file`` takes it."""
        return self.configs.format(row.name)

    def folder(self, row: Row) -> Path:
        """Return the folder of a row's runs, relative to that of all runs.

        It depends on the config alone, so tables with a config in common share its runs.
        """
        return Path(self.config(row)).with_suffix("")

    def row(self, name: str) -> Row:
        """Return the row of that name.

        Raises:
            UserError: if there is none; the message lists all names.
        """
        for row in self.rows:
            if row.name == name:
                return row
        names = ", ".join(row.name for row in self.rows)
        raise UserError(f"--rows: {self.title!r} has no row {name!r}; its rows are: {names}")


BOX_AND_MASK = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75")
KEYPOINTS = ("keypoints/AP", "keypoints/AP50", "keypoints/AP75")

TABLES = {
    "table5": Table(
        "Table 5: Mask R-CNN on COCO, settings of Detectron",
        "Detectron1-Comparisons/mask_rcnn_{}.yaml",
        BOX_AND_MASK,
        [
            Row("R_50_FPN_noaug_1x", None, (38.0, 59.6, 41.0, 34.6, 56.4, 36.5)),
            Row("R_50_FPN_NL_noaug_1x", "R_50_FPN_noaug_1x", (39.0, 61.1, 41.9, 35.5, 58.0, 37.4)),
            Row("R_101_FPN_noaug_1x", None, (39.5, 61.4, 42.9, 36.0, 58.1, 38.3)),
            Row(
                "R_101_FPN_NL_noaug_1x", "R_101_FPN_noaug_1x", (40.8, 63.1, 44.5, 37.1, 59.9, 39.2)
            ),
            Row("X_152_32x8d_FPN_noaug_1x", None, (44.1, 66.4, 48.4, 39.7, 63.2, 42.2)),
            Row(
                "X_152_32x8d_FPN_NL_noaug_1x",
                "X_152_32x8d_FPN_noaug_1x",
                (45.0, 67.8, 48.9, 40.3, 64.4, 42.8),
            ),
        ],
    ),
    "table5-modern": Table(
        "Table 5 with detectron2's default settings",
        "COCO-InstanceSegmentation/mask_rcnn_{}.yaml",
        BOX_AND_MASK,
        [
            row
            for schedule in ("1x", "3x")
            for model in ("R_50_FPN", "R_101_FPN", "X_152_32x8d_FPN")
            for row in (
                Row(f"{model}_{schedule}"),
                Row(f"{model}_NL_{schedule}", f"{model}_{schedule}"),
            )
        ],
    ),
    "table6": Table(
        "Table 6: keypoints on COCO, settings of Detectron",
        "Detectron1-Comparisons/keypoint_rcnn_{}.yaml",
        KEYPOINTS,
        [
            Row("R_101_FPN_1x", None, (65.1, 86.8, 70.4)),
            Row("R_101_FPN_NL_head_1x", "R_101_FPN_1x", (66.0, 87.1, 71.7)),
            Row("R_101_FPN_NL_head_backbone_1x", "R_101_FPN_1x", (66.5, 87.3, 72.8)),
        ],
    ),
    "ablations": Table(
        "Pairwise functions and numbers of blocks, on COCO",
        "COCO-InstanceSegmentation/mask_rcnn_{}.yaml",
        BOX_AND_MASK,
        [
            Row("R_50_FPN_1x"),
            Row("R_50_FPN_NL_1x", "R_50_FPN_1x"),
            Row("R_50_FPN_NL_gaussian_1x", "R_50_FPN_1x"),
            Row("R_50_FPN_NL_dot_product_1x", "R_50_FPN_1x"),
            Row("R_50_FPN_NL_concatenation_1x", "R_50_FPN_1x"),
            Row("R_50_FPN_NL_5_blocks_1x", "R_50_FPN_1x"),
            Row("R_50_FPN_NL_10_blocks_1x", "R_50_FPN_1x"),
        ],
    ),
    "synthetic": Table(
        "Synthetic long-range data",
        "Synthetic/mask_rcnn_{}.yaml",
        BOX_AND_MASK,
        [Row("R_18_FPN"), Row("R_18_FPN_NL", "R_18_FPN")],
        image_size=(64, 320),
    ),
}
