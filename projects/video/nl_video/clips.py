"""Decode the frames of clips, sample and crop them as in Sec. 4.1 of the paper."""

import zlib
from collections.abc import Callable

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

    Raises:
        ImageError: the file is missing or cannot be decoded.
    """
    try:
        open(path, "rb").close()  # for a clear error
        return (decode_with_opencv if av is None else decode_with_pyav)(path, choose, transform)
    except Exception as error:  # decoders raise anything on broken files
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImageError(f"{path} cannot be decoded ({problem}); repair or remove it") from error


def decode_with_pyav(path: str, choose: Callable, transform: Callable) -> list[np.ndarray]:
    """Decode from the last key frame before the first wanted frame on.

    The packets of the file are listed first, which decodes nothing. So the number and the indices
    of frames are exact in all containers, also with a variable frame rate.
    """
    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # the workers are the parallel part
        packets = [packet for packet in container.demux(stream) if packet.size]
        times = [packet.dts if packet.pts is None else packet.pts for packet in packets]
        in_header = stream.frames  # 0 where the container does not store it
        if not times or len(times) < 0.9 * in_header:
            raise ValueError(f"truncated: {len(times)} of {in_header} frames are there")
        index_of = {time: index for index, time in enumerate(sorted(times))}
        keys = {index_of[time]: time for packet, time in zip(packets, times) if packet.is_keyframe}
        chosen, decoded = choose(len(times)), {}
        key = max((key for key in keys if key <= min(chosen)), default=min(keys))
        container.seek(keys[key], stream=stream)
        index = key - 1  # of the last decoded frame
        for frame in container.decode(stream):
            index = index_of.get(frame.pts, index + 1)
            if index in chosen:
                rgb = frame.to_ndarray(format="rgb24")
                decoded[index] = transform(np.rot90(rgb, frame.rotation // 90))
            if index >= max(chosen):
                break
        return [decoded[index] for index in chosen]


def decode_with_opencv(path: str, choose: Callable, transform: Callable) -> list[np.ndarray]:
    """Decode from the first wanted frame on, and trust the number of frames in the header."""
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if count < 1:
        raise ValueError("it has no video stream, or no frame in it")
    chosen, decoded = choose(count), {}
    capture.set(cv2.CAP_PROP_POS_FRAMES, min(chosen))
    for index in range(min(chosen), max(chosen) + 1):
        if not capture.grab():
            raise ValueError(f"truncated: frame {index} of {count} is not there")
        if index in chosen:
            decoded[index] = transform(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    return [decoded[index] for index in chosen]


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
            side = max(rng.integers(*self._clip.MIN_SIDE, endpoint=True), size)
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
