"""Decode the frames of clips, sample and crop them as in Sec. 4.1 of the paper."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode

from nl_detectron.data.train_loader import ImageError

try:
    import av
except ImportError:
    av = None

cv2.setNumThreads(0)  # threads of a process do not survive in the workers that it forks


def read_frames(path: str, choose: Callable, transform: Callable = np.asarray) -> list[np.ndarray]:
    """Decode some frames of a video, with PyAV or, if that is not installed, with OpenCV.

    Args:
        choose: maps the number of frames to the indices of the wanted ones, in any order.
        transform: applied to each wanted frame, (H, W, 3), uint8, RGB, rotated for display.

    Raises an ImageError if the file is missing or cannot be decoded.
    """
    try:
        return (_read_with_opencv if av is None else _read_with_pyav)(path, choose, transform)
    except Exception as error:  # decoders raise anything on broken files
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImageError(f"{path} cannot be decoded ({problem}); repair or remove it") from error


def _read_with_pyav(path: str, choose: Callable, transform: Callable) -> list[np.ndarray]:
    """Decode from the last key frame before the first wanted frame on."""
    with open_video(path) as (container, stream):
        packets = [(p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
        in_header, duration = stream.frames, stream.duration  # 0 and None if they are not stored
        is_exact = container.format.name.startswith(("mov,mp4", "matroska"))
    # Packets outside a cut of mp4 are listed to be discarded, or not listed. A hidden frame of VP8
    # has the time of another.
    times = sorted({time for time, _, is_discard in packets if not is_discard} - {None})
    if not packets or (len(packets) < 0.9 * in_header and times[-1] - times[0] < 0.9 * duration):
        raise ValueError(f"truncated: {len(packets)} of {in_header} frames are there")
    if not is_exact:  # times are wrong in AVI, seeking in MPEG-TS: decode and number all frames
        packets, times = [], range(sum(1 for _ in decode_from(path)))
    chosen, decoded = choose(len(times)), {}
    keys = [time for time, is_key, _ in packets if is_key and time <= times[min(chosen)]]
    index_of = {time: index for index, time in enumerate(times)}
    for number, frame in enumerate(decode_from(path, max(keys, default=None))):
        index = index_of.get(frame.pts if is_exact else number, -1)
        if index in chosen:
            rgb = frame.to_ndarray(format="rgb24")
            decoded[index] = transform(np.rot90(rgb, frame.rotation // 90))
        if index >= max(chosen):
            break
    return [decoded[index] for index in chosen]


def _read_with_opencv(path: str, choose: Callable, transform: Callable) -> list[np.ndarray]:
    """Decode from the first wanted frame on, and trust the number of frames in the header."""
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if count < 1:
        raise ValueError("it is missing, or has no video stream or no frame")
    chosen, decoded = choose(count), {}
    capture.set(cv2.CAP_PROP_POS_FRAMES, min(chosen))
    for index in range(min(chosen), max(chosen) + 1):
        if not capture.grab():
            raise ValueError(f"truncated: frame {index} of {count} is not there")
        if index in chosen:
            decoded[index] = transform(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    return [decoded[index] for index in chosen]


@contextmanager
def open_video(path: str) -> Iterator[tuple]:
    """Open a file, and give its container and its video stream."""
    with av.open(path, metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            raise ValueError("it has no video stream, or is truncated")
        stream.thread_type = "NONE"  # the workers are the parallel part
        yield container, stream


def decode_from(path: str, key: int | None = None) -> Iterator["av.VideoFrame"]:
    """Yield all frames of a video, or those from the key frame at a time on."""
    with open_video(path) as (container, stream):
        if key is not None:
            container.seek(key, stream=stream)
        yield from container.decode(stream)


class ClipMapper:
    """Map a dataset dict, ``{"file_name", "label", "video_id"}``, to an input of the model.

    The input has also "clips", (V, 3, T, H, W), uint8, RGB. In training, and in evaluation with
    ``TEST.CLIP.PROTOCOL "jitter"``, it is V = 1 clip with random time, scale, crop and flip, which
    in evaluation depend on the video alone. With "views", V = CLIPS * CROPS: at equal distances in
    time, square crops of SIDE from one end of the long side to the other.
    """

    def __init__(self, cfg: CfgNode, is_train: bool):
        self._clip, self._test, self._is_train = cfg.INPUT.CLIP, cfg.TEST.CLIP, is_train

    def __call__(self, dataset_dict: dict) -> dict:
        if self._is_train or self._test.PROTOCOL == "jitter":
            # TrainLoader seeds the global generators for each video.
            video_id = dataset_dict["video_id"].encode()
            seed = np.random.randint(2**31) if self._is_train else zlib.crc32(video_id)
            rng = np.random.default_rng(seed)
            size = self._clip.CROP
            side = max(rng.integers(*sorted(self._clip.MIN_SIDE), endpoint=True), size)
            starts, places = rng.random(1), rng.random((1, 2))
            step = -1 if self._clip.FLIP and rng.random() < 0.5 else 1
        else:
            side = size = self._test.SIDE
            starts, step = spread(self._test.CLIPS), 1
            places = [(place, place) for place in spread(self._test.CROPS)]

        def choose(count: int) -> np.ndarray:
            return np.concatenate([self._indices(start, count) for start in starts])

        def resize(frame: np.ndarray) -> np.ndarray:
            scale = side / min(frame.shape[:2])
            return cv2.resize(frame, None, fx=scale, fy=scale)

        frames = read_frames(dataset_dict["file_name"], choose, resize)
        clips = np.stack(frames).reshape(len(starts), -1, *frames[0].shape)
        height, width = clips.shape[2:4]
        corners = [(position(y, height, size), position(x, width, size)) for y, x in places]
        clips = np.concatenate([clips[:, :, y : y + size, x : x + size] for y, x in corners])
        clips = np.ascontiguousarray(clips[:, :, :, ::step].transpose(0, 4, 1, 2, 3))
        return {**dataset_dict, "clips": torch.from_numpy(clips)}

    def _indices(self, start: float, count: int) -> np.ndarray:
        """Return the frames of a clip in a video of ``count`` frames; its start is in [0, 1]."""
        first = position(start, count, self._clip.FRAMES * self._clip.STRIDE)
        indices = first + self._clip.STRIDE * np.arange(self._clip.FRAMES)
        loop = self._clip.SHORT_VIDEO == "loop"
        return indices % count if loop else np.minimum(indices, count - 1)


def spread(count: int) -> np.ndarray:
    return np.linspace(0, 1, count) if count > 1 else np.array([0.5])


def position(place: float, length: int, size: int) -> int:
    """Return where a part of some size begins; place 0 is the first possibility, 1 the last."""
    return int(place * (max(length - size, 0) + 0.999))
