"""Datasets of videos: list files, folders of classes, their registration and check."""

import logging
import os
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from nl_detectron.data.coco import check_registered
from nl_detectron.data.train_loader import ImageError
from nl_detectron.errors import UserError

from .clips import read_frames
from .config import check_choices

SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov")


def read_videos(source: Union[str, Path]) -> list[dict]:
    """Return ``{"file_name", "label", "video_id"}`` of each video; the id is its path in there.

    ``source`` is a text file with ``path label`` in each line, as SlowFast reads them, with paths
    relative to its folder; or a folder with one subfolder of videos per class.
    """
    root, videos, lines = Path(source), [], []
    if root.is_dir():
        for label, name in enumerate(read_classes(root)):
            paths = sorted(p for p in (root / name).iterdir() if p.suffix.lower() in SUFFIXES)
            videos += [(f"{name}/{path.name}", label) for path in paths]
    elif root.is_file():
        with suppress(UnicodeDecodeError):
            lines = root.read_text("utf-8-sig").splitlines()
        for number, line in enumerate(lines, start=1):
            if match := re.fullmatch(r"\s*(.*\S)\s+(\d+)\s*", line):
                videos.append((match[1], int(match[2])))
            elif line.strip():
                raise UserError(f"{source}, line {number}: {line!r} is not 'path label'")
        root = root.parent
    if not videos:
        raise UserError(f"{source} is not a list of videos (UTF-8) or a folder of their classes")
    return [{"file_name": str(root / p), "label": label, "video_id": p} for p, label in videos]


def read_classes(source: Union[str, Path]) -> Optional[list[str]]:
    """Return the names of the subfolders, or the lines of classes.txt beside a list file."""
    source = Path(source)
    if source.is_dir():
        return sorted(path.name for path in source.glob("[!.]*") if path.is_dir())
    names = source.parent / "classes.txt"
    return names.read_text("utf-8-sig").strip().splitlines() if names.is_file() else None


def class_names(cfg: CfgNode, dataset: str) -> Optional[list[str]]:
    """Return the names of the classes of a dataset, registered or a path, if it has names."""
    names = MetadataCatalog.get(dataset).get("classes") or read_classes(dataset)
    if names and len(names) != (count := cfg.MODEL.VIDEO.NUM_CLASSES):
        raise UserError(f"MODEL.VIDEO.NUM_CLASSES is {count}, but {dataset} has {len(names)}")
    return names


@dataclass
class VideoDataset:
    """A dataset to register, also in the processes that a training spawns."""

    name: str
    load: Callable[[], list[dict]]
    classes: Optional[list[str]] = None

    def register(self) -> None:
        DatasetCatalog.pop(self.name, None)
        DatasetCatalog.register(self.name, self.load)
        if self.classes:
            MetadataCatalog.get(self.name).classes = self.classes


def check_datasets(cfg: CfgNode, args: Namespace, _: Sequence[Any] = ()) -> list[VideoDataset]:
    """Check that labels are in range and, with INPUT.CLIP.CHECK, that videos can be decoded.

    Paths of list files or folders are registered as datasets. With INPUT.CLIP.ON_BAD_VIDEO "skip",
    datasets are registered again without bad videos, and their number is logged.
    """
    check_choices(cfg)
    checked, split = [], "TEST" if args.eval_only else "TRAIN"
    if not cfg.DATASETS[split]:
        raise UserError(f"DATASETS.{split} is empty; set it to list files or folders of videos")
    for name in cfg.DATASETS.TEST + (() if args.eval_only else cfg.DATASETS.TRAIN):
        if name not in DatasetCatalog and os.path.exists(name):
            VideoDataset(name, partial(read_videos, name), read_classes(name)).register()
        check_registered(f"DATASETS (no file {os.path.abspath(name)})", name)
        videos, classes = DatasetCatalog.get(name), class_names(cfg, name)
        with ThreadPoolExecutor() as pool:
            problems = list(pool.map(partial(_find_problem, cfg), videos))
        usable = [video for video, problem in zip(videos, problems) if not problem]
        problems = list(filter(None, problems))
        summary = f"{name}: {len(problems)} of {len(videos)} videos"
        if problems and (cfg.INPUT.CLIP.ON_BAD_VIDEO == "error" or not usable):
            hint = "INPUT.CLIP.ON_BAD_VIDEO skip leaves them out"
            raise UserError(f"{summary} cannot be used. The first: {problems[0]}. {hint}")
        if problems:
            logging.getLogger(__name__).warning("\n".join([f"{summary} skipped:", *problems]))
        checked.append(VideoDataset(name, partial(list, usable), classes))
        checked[-1].register()
    return checked


def _find_problem(cfg: CfgNode, video: dict) -> str:
    """Return why a video cannot be used, or an empty string."""
    path, label, classes = video["file_name"], video["label"], cfg.MODEL.VIDEO.NUM_CLASSES
    if label >= classes:
        return f"{path} has label {label}, but MODEL.VIDEO.NUM_CLASSES is {classes}"
    try:
        for place in (0, -1) if cfg.INPUT.CLIP.CHECK else ():
            read_frames(path, lambda count, place=place: np.array([place % count]))
    except ImageError as error:
        return str(error)
    return ""
