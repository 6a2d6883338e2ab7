"""Synthetic videos whose class is an exclusive or of a cue early and an event late.

The cue is a disc, red or blue, in four of the frames 4 to 11. The event is a light bar, horizontal
or vertical, in four of the frames 24 to 31. Class 1 is (red and vertical) or (blue and horizontal).
Other shapes move through all frames. The four combinations are equally frequent in each split.

Why C2D without a non-local block is at chance: with strides of 2 in time for conv1, pool1 and
pool2, each of its features depends on 13 consecutive frames of the clip. The last frame of the cue
and the first of the event are at least 13 apart, so no feature depends on both. Its two logits are
linear in the average of the features, so their difference is d = a(cue, ...) + b(event, ...), and
the class, y = -1 or 1, is independent of the cue and of the event alone: E[y d] = 0. The loss is
convex, so E[log(1 + exp(-y d))] >= log(1 + exp(-E[y d])) = log 2, that of a guess: the best that
C2D can learn is d = 0. Blocks that relate only positions of one frame do not change this. (The
cross-entropy, not the top-1, has this bound: the sign of a d near 0 is right for one, two or three
of the four combinations, so that the top-1 of a network at chance can be 25, 50 or 75%.)

The files are lossless, because the artefacts of a lossy codec could carry the cue on.
"""

import json
import math
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from nl_detectron.errors import UserError
from nl_detectron.files import write_atomically

from .clips import av
from .data import ROOT, read_videos

SIDE, FRAMES, DURATION = 48, 36, 4  # pixels, frames, and frames that cue and event are visible
FIRST_CUE, FIRST_EVENT = (4, 8), (24, 28)  # ranges of their first frames
CUES, EVENTS = ("red", "blue"), ("horizontal", "vertical")
COLOURS = {"red": (210, 40, 40), "blue": (50, 70, 220)}
DISTRACTORS = [(60, 160, 70), (200, 180, 60), (150, 150, 150), (110, 60, 140)]
CLASSES = {
    "xor": ["red horizontal or blue vertical", "red vertical or blue horizontal"],
    "both": [f"{cue} {event}" for cue in CUES for event in EVENTS],
}
SPLITS = {"train": 1024, "val": 256}


def draw(seed: tuple[int, ...], cue: int, event: int) -> tuple[list[np.ndarray], dict]:
    """Return the frames, (SIDE, SIDE, 3), uint8, RGB, and where cue and event are.

    Videos of one seed differ in nothing but the colour of the cue and the direction of the bar.
    """
    rng = np.random.default_rng(seed)
    ground = rng.uniform(70, 110)
    grain = rng.normal(0, 5, (SIDE // 4, SIDE // 4, 1)).repeat(4, 0).repeat(4, 1) + ground
    still = grain.repeat(3, 2).clip(0, 255).astype(np.uint8)
    shapes = [
        (rng.uniform(0, SIDE, 2), rng.normal(0, 1.5, 2), rng.uniform(2, 4), colour, rng.random())
        for colour in rng.permutation(DISTRACTORS).tolist()
    ]
    (cue_x, cue_y), (x, y) = rng.integers(9, SIDE - 9, (2, 2)).tolist()
    first_cue, first_event = (
        int(rng.integers(*r, endpoint=True)) for r in (FIRST_CUE, FIRST_EVENT)
    )
    frames = []
    for index in range(FRAMES):
        frame = still.copy()
        for place, step, radius, colour, kind in shapes:
            centre = np.rint((place + index * step) % SIDE).astype(int)
            if kind < 0.5:
                cv2.circle(frame, centre.tolist(), round(radius), colour, -1)
            else:
                start, end = np.rint([centre - radius, centre + radius]).astype(int).tolist()
                cv2.rectangle(frame, start, end, colour, -1)
        if first_cue <= index < first_cue + DURATION:
            cv2.circle(frame, (cue_x, cue_y), 6, COLOURS[CUES[cue]], -1)
        if first_event <= index < first_event + DURATION:
            w, h = (8, 2) if EVENTS[event] == "horizontal" else (2, 8)
            cv2.rectangle(frame, (x - w, y - h), (x + w, y + h), (230, 230, 230), -1)
        frames.append(frame)
    return frames, {"cue": [first_cue, cue_x, cue_y], "event": [first_event, x, y]}


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """Write a lossless mp4 file: H.264 in RGB, with a key frame every 12 frames."""
    if av is None:
        raise UserError("the synthetic videos are written with PyAV: pip install av")
    with av.open(str(path), "w") as container:
        options = {"qp": "0", "preset": "ultrafast", "g": "12"}
        stream = container.add_stream("libx264rgb", rate=12, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.thread_count = "rgb24", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def generate(folder: Path, splits: dict[str, int]) -> None:
    """Write videos, list files with the classes "xor" and "both", and a description of each video.

    A file of descriptions, ``<split>.json``, is written last; a split that has it is left as it is.
    """
    for number, (split, count) in enumerate(splits.items()):
        if (folder / f"{split}.json").is_file():
            continue
        (folder / split).mkdir(parents=True, exist_ok=True)
        lines, described = {task: [] for task in CLASSES}, {}
        for i in tqdm(range(count), f"writing {folder / split}"):
            cue, event = divmod(i % 4, 2)
            frames, places = draw((number, i), cue, event)
            name = f"{split}/{i:0{int(math.log10(count)) + 1}}.mp4"
            write_video(folder / name, frames)
            lines["xor"].append(f"{name} {cue ^ event}\n")
            lines["both"].append(f"{name} {2 * cue + event}\n")
            described[name] = {"cue is": CUES[cue], "event is": EVENTS[event], **places}
        for task in CLASSES:
            (folder / f"{split}_{task}.txt").write_text("".join(lines[task]))
        with write_atomically(folder / f"{split}.json", "w") as file:
            json.dump(described, file)


def _load(folder: Path, split: str, task: str) -> list[dict]:
    generate(folder, SPLITS)
    return read_videos(folder / f"{split}_{task}.txt")


def register(folder: Path, prefix: str = "nl_synthetic_video") -> None:
    for split in SPLITS:
        for task, classes in CLASSES.items():
            name = f"{prefix}_{task}_{split}"
            DatasetCatalog.register(name, partial(_load, folder, split, task))
            MetadataCatalog.get(name).set(evaluator_type="video", classes=classes)


register(ROOT / "nl_synthetic_video")
