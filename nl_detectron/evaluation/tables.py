"""The detection tables of the paper and the configs that reproduce them.

All numbers are from https://arxiv.org/abs/1711.07971, Tables 5 and 6: percent, on COCO val2017.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows that are reported together."""

    title: str
    configs: str  # pattern of the config names, with "{}" in place of the row's name
    metrics: tuple[str, ...]  # keys of metrics.json
    # Name -> the paper's metrics, if any. The baseline of a row with "_NL" is the last one without.
    rows: dict[str, tuple[float, ...]]

    def config(self, row: str) -> str:
        """Return the name of a row's config, as ``get_config_file`` takes it."""
        return self.configs.format(row)


BOX_AND_MASK = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75")
ABLATIONS = "_NL _NL_gaussian _NL_dot_product _NL_concatenation _NL_5_blocks _NL_10_blocks".split()

TABLES = {
    "table5": Table(
        "Table 5: Mask R-CNN on COCO, settings of Detectron",
        "Detectron1-Comparisons/mask_rcnn_{}.yaml",
        BOX_AND_MASK,
        {
            "R_50_FPN_noaug_1x": (38.0, 59.6, 41.0, 34.6, 56.4, 36.5),
            "R_50_FPN_NL_noaug_1x": (39.0, 61.1, 41.9, 35.5, 58.0, 37.4),
            "R_101_FPN_noaug_1x": (39.5, 61.4, 42.9, 36.0, 58.1, 38.3),
            "R_101_FPN_NL_noaug_1x": (40.8, 63.1, 44.5, 37.1, 59.9, 39.2),
            "X_152_32x8d_FPN_noaug_1x": (44.1, 66.4, 48.4, 39.7, 63.2, 42.2),
            "X_152_32x8d_FPN_NL_noaug_1x": (45.0, 67.8, 48.9, 40.3, 64.4, 42.8),
        },
    ),
    "table5-modern": Table(
        "Table 5 with detectron2's default settings",
        "COCO-InstanceSegmentation/mask_rcnn_{}.yaml",
        BOX_AND_MASK,
        {
            f"{model}_FPN{block}_{schedule}": ()
            for schedule in ("1x", "3x")
            for model in ("R_50", "R_101", "X_152_32x8d")
            for block in ("", "_NL")
        },
    ),
    "table6": Table(
        "Table 6: keypoints on COCO, settings of Detectron",
        "Detectron1-Comparisons/keypoint_rcnn_{}.yaml",
        ("keypoints/AP", "keypoints/AP50", "keypoints/AP75"),
        {
            "R_101_FPN_1x": (65.1, 86.8, 70.4),
            "R_101_FPN_NL_head_1x": (66.0, 87.1, 71.7),
            "R_101_FPN_NL_head_backbone_1x": (66.5, 87.3, 72.8),
        },
    ),
    "ablations": Table(
        "Pairwise functions and numbers of blocks, on COCO",
        "COCO-InstanceSegmentation/mask_rcnn_{}.yaml",
        BOX_AND_MASK,
        {f"R_50_FPN{blocks}_1x": () for blocks in ["", *ABLATIONS]},
    ),
    "synthetic": Table(
        "Synthetic long-range data",
        "Synthetic/mask_rcnn_{}.yaml",
        BOX_AND_MASK,
        {"R_18_FPN": (), "R_18_FPN_NL": ()},
    ),
}
