"""Short names of runs and of detections, for legends, titles and labels."""

import re
from collections.abc import Sequence
from pathlib import Path

from detectron2.structures import Instances


def run_names(folders: Sequence[Path]) -> list[str]:
    """The name of each run's config, by its folder; of folders that would share one, their paths.

    Args:
        folders: ``.../<config>/seed<number>``, as ``tools/reproduce.py`` and ``make demo`` have
            them, or ``.../<name>``. Files in ``inference`` of these stand for them.
    """
    short = []
    for folder in folders:
        path = folder.resolve()
        if path.parent.name == "inference":
            path = path.parents[1]
        short.append(path.parent.name if re.fullmatch(r"seed\d+", path.name) else path.name)
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def detection_labels(instances: Instances, class_names: Sequence[str]) -> list[str]:
    """Such as "lock 98%"; of a class without a name, "class 3 98%"."""
    numbers, scores = instances.pred_classes.tolist(), instances.scores.tolist()
    names = dict(enumerate(class_names))
    return [f"{names.get(n, f'class {n}')} {score:.0%}" for n, score in zip(numbers, scores)]
