"""Datasets of videos: list files, folders of classes, their registration, checks and loaders."""

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Optional, Union

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import BatchSampler

from nl_detectron.data.coco import check_registered
from nl_detectron.data.train_loader import ImageLoader, TrainLoader
from nl_detectron.errors import OptionError, UserError

from .clips import ClipMapper, VideoError, read_frames

SUFFIXES = (".mp4", ".avi", ".webm", ".mkv", ".mov")
ROOT = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def read_videos(source: Union[str, Path]) -> list[dict]:
    """Read a dataset of videos.

    Args:
        source: a text file with ``path label`` in each line, as SlowFast reads them, with paths
            relative to the file's folder; or a folder with one subfolder of videos per class.

    Returns:
        ``{"file_name", "label", "video_id"}`` of each video; the id is the path relative to the
        folder.

    Raises:
        UserError: the source is missing or empty, or a line is broken.
    """
    source, videos = Path(source), []
    if source.is_dir():
        for label, name in enumerate(class_names(source)):
            paths = sorted(p for p in (source / name).iterdir() if p.suffix.lower() in SUFFIXES)
            videos += [(str(path.relative_to(source)), label) for path in paths]
    elif source.is_file():
        for number, line in enumerate(source.read_text().splitlines(), start=1):
            path, _, label = line.strip().rpartition(" ")
            if line.strip() and not (path and label.isdecimal()):
                raise UserError(f"{source}, line {number}: {line!r} is not a path and a label")
            if line.strip():
                videos.append((path, int(label)))
    if not videos:
        raise UserError(f"{source} is not a list of videos or a folder of classes with videos")
    root = source if source.is_dir() else source.parent
    return [
        {"file_name": str(root / path), "label": label, "video_id": path} for path, label in videos
    ]


def class_names(source: Union[str, Path]) -> Optional[list[str]]:
    """Return the names of the subfolders, or the lines of classes.txt beside a list file."""
    source = Path(source)
    if source.is_dir():
        return sorted(path.name for path in source.iterdir() if path.is_dir())
    names = source.parent / "classes.txt"
    return names.read_text().splitlines() if names.is_file() else None


def register_videos(name: str, source: Union[str, Path]) -> None:
    """Register a dataset of :func:`read_videos`, which is read when it is used."""
    DatasetCatalog.register(name, partial(read_videos, source))
    metadata = MetadataCatalog.get(name).set(evaluator_type="video")
    if (classes := class_names(source)) is not None:
        metadata.set(classes=classes)


def register_paths(cfg: CfgNode) -> None:
    """Register the names in DATASETS that are paths of list files or folders."""
    for name in {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} - set(DatasetCatalog.list()):
        if os.path.exists(name):
            register_videos(name, name)


def check_videos(cfg: CfgNode, names: Iterable[str]) -> None:
    """Check that labels are in range, files are there and, with INPUT.CLIP.CHECK, can be decoded.

    With ``INPUT.CLIP.ON_BAD_VIDEO "skip"``, bad files are removed from the registered datasets, and
    their number is logged.

    Raises:
        UserError: a dataset is bad, or a file is and ON_BAD_VIDEO is "error".
    """
    policy, classes = cfg.INPUT.CLIP.ON_BAD_VIDEO, cfg.MODEL.VIDEO.NUM_CLASSES
    if policy not in ("error", "skip"):
        raise OptionError("INPUT.CLIP.ON_BAD_VIDEO", f"is {policy!r}; valid: 'error' and 'skip'")
    problem = partial(_problem, decode=cfg.INPUT.CLIP.CHECK)
    for name in names:
        check_registered("DATASETS", name)
        videos = DatasetCatalog.get(name)
        for video in videos:
            if video["label"] >= classes:
                raise UserError(
                    f"{name}: {video['file_name']} has label {video['label']}, but the labels of "
                    f"MODEL.VIDEO.NUM_CLASSES {classes} are 0 to {classes - 1}"
                )
        with ThreadPoolExecutor() as pool:
            mine = videos[comm.get_rank() :: comm.get_world_size()]
            problems = dict(zip((v["video_id"] for v in mine), pool.map(problem, mine)))
        problems = {key: p for part in comm.all_gather(problems) for key, p in part.items() if p}
        if problems and (policy == "error" or len(problems) == len(videos)):
            raise UserError(
                f"{name}: {len(problems)} of {len(videos)} videos cannot be used. The first: "
                f"{next(iter(problems.values()))}. INPUT.CLIP.ON_BAD_VIDEO skip leaves them out"
            )
        if problems:
            text = "\n".join(problems.values())
            logger = logging.getLogger("nl_detectron.video")
            logger.warning(f"{name}: {len(problems)} of {len(videos)} videos skipped:\n{text}")
            good = [video for video in videos if video["video_id"] not in problems]
            DatasetCatalog.remove(name)
            DatasetCatalog.register(name, lambda good=good: good)


def _problem(video: dict, decode: bool) -> str:
    """Return why a video cannot be used, or an empty string."""
    if not decode:
        return "" if os.path.isfile(video["file_name"]) else f"there is no {video['file_name']}"
    try:
        read_frames(video["file_name"], lambda count: np.array([0, count - 1]))
    except VideoError as error:
        return str(error)
    return ""


def build_train_loader(cfg: CfgNode) -> TrainLoader:
    """Return the training clips: batch i depends on SEED and i alone, so resuming is exact."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    return TrainLoader(cfg, ClipMapper(cfg, is_train=True))


def build_test_loader(cfg: CfgNode, name: str) -> ImageLoader:
    """Return the clips of a dataset. Each process gets other videos, and each video is there once.

    Views are loaded one video at a time, jittered clips in batches as large as in training.
    """
    videos = DatasetCatalog.get(name)
    jitter = cfg.TEST.CLIP.PROTOCOL == "jitter"
    size = max(cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), 1) if jitter else 1
    indices = BatchSampler(InferenceSampler(len(videos)), size, drop_last=False)
    batches = [[(videos[i], None) for i in batch] for batch in indices]
    mapper = ClipMapper(cfg, is_train=False)
    return ImageLoader(mapper, batches, num_workers=cfg.DATALOADER.NUM_WORKERS)


for _split in ("train", "val"):
    register_videos(f"kinetics400_{_split}", ROOT / f"kinetics400/{_split}.csv")
