"""Synthetic videos whose class is an exclusive or of a cue early and an event late.

The cue is a disc, red or blue, in four of the frames 4 to 11. The event is a light bar, horizontal
or vertical, in four of the frames 24 to 29. Class 1 is (red and vertical) or (blue and horizontal).
Other shapes move through all frames. The four combinations are equally frequent in each split. The
README proves that C2D without a non-local block is at chance.
"""

import os
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from detectron2.utils import comm
from tqdm import tqdm

from .data import VideoDataset, read_videos

SIDE, FRAMES, DURATION = 48, 36, 4  # pixels, frames, and frames that cue and event are visible
FIRST_CUE, FIRST_EVENT = (4, 8), (24, 26)  # ranges of their first frames
COLOURS = {"red": (210, 40, 40), "blue": (50, 70, 220)}  # of the cue
BARS = {"horizontal": (8, 2), "vertical": (2, 8)}  # half of the width and height of the event
DISTRACTORS = [(60, 160, 70), (200, 180, 60), (150, 150, 150), (110, 60, 140)]
CLASSES = {
    "xor": ["red horizontal or blue vertical", "red vertical or blue horizontal"],
    "both": [f"{cue} {event}" for cue in COLOURS for event in BARS],
}
SPLITS = {"train": 1024, "val": 256}
FOLDER = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser() / "nl_synthetic_video"


def draw(seed: tuple[int, ...], cue: int, event: int) -> tuple[list[np.ndarray], dict]:
    """Return the frames, (SIDE, SIDE, 3), uint8, RGB, and the frame, x and y of cue and event.

    Videos of one seed differ in nothing but the colour of the cue and the direction of the bar.
    """
    rng = np.random.default_rng(seed)
    grain = rng.normal(rng.uniform(70, 110), 5, (SIDE // 4, SIDE // 4, 1))
    ground = grain.repeat(4, 0).repeat(4, 1).repeat(3, 2).clip(0, 255).astype(np.uint8)
    starts, steps = rng.uniform(0, SIDE, (4, 2)), rng.normal(0, 1.5, (4, 2))
    radii, colours = rng.integers(2, 5, 4).tolist(), rng.permutation(DISTRACTORS).tolist()
    (cue_x, cue_y), (x, y) = rng.integers(9, SIDE - 9, (2, 2)).tolist()
    first_cue = int(rng.integers(*FIRST_CUE, endpoint=True))
    first_event = int(rng.integers(*FIRST_EVENT, endpoint=True))
    width, height = list(BARS.values())[event]
    frames = []
    for index in range(FRAMES):
        frame = ground.copy()
        centres = ((starts + index * steps) % SIDE).astype(int).tolist()
        for centre, radius, colour in zip(centres, radii, colours):
            cv2.circle(frame, centre, radius, colour, -1)
        if first_cue <= index < first_cue + DURATION:
            cv2.circle(frame, (cue_x, cue_y), 6, list(COLOURS.values())[cue], -1)
        if first_event <= index < first_event + DURATION:
            cv2.rectangle(frame, (x - width, y - height), (x + width, y + height), (230,) * 3, -1)
        frames.append(frame)
    return frames, {"cue": [first_cue, cue_x, cue_y], "event": [first_event, x, y]}


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """Write FFV1, which is lossless: artefacts of a lossy codec could carry the cue on."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 12, (SIDE, SIDE))
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()


def generate(folder: Path, split: str, count: int) -> None:
    """Write the videos of a split, and its list files, unless the second of them exists."""
    if (folder / f"{split}_both.txt").is_file():
        return
    (folder / split).mkdir(parents=True, exist_ok=True)
    lines = {"xor": [], "both": []}
    for i in tqdm(range(count), f"writing {folder / split}"):
        cue, event = divmod(i % 4, 2)
        name = f"{split}/{i:04}.mp4"
        write_video(folder / name, draw((list(SPLITS).index(split), i), cue, event)[0])
        lines["xor"].append(f"{name} {cue ^ event}\n")
        lines["both"].append(f"{name} {2 * cue + event}\n")
    for task in lines:
        (folder / f"{split}_{task}.txt").write_text("".join(lines[task]))


def load(split: str, task: str) -> list[dict]:
    if comm.is_main_process():  # several would overwrite what the others read
        generate(FOLDER, split, SPLITS[split])
    comm.synchronize()
    return read_videos(FOLDER / f"{split}_{task}.txt")


for _split in SPLITS:
    for _task, _classes in CLASSES.items():
        _name = f"nl_synthetic_video_{_task}_{_split}"
        VideoDataset(_name, partial(load, _split, _task), _classes).register()
