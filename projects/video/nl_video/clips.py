"""Decode the frames of clips, sample and crop them as in Sec. 4.1 of the paper."""

import zlib
from bisect import bisect_right
from collections.abc import Callable
from contextlib import closing

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from numpy.random import Generator

from nl_detectron.data.train_loader import ImageError
from nl_detectron.errors import OptionError

try:
    import av
except ImportError:
    av = None


class VideoError(ImageError):
    """A video cannot be used. The message names the file."""


class PyAVReader:
    """Decode single frames of a file with PyAV.

    Attributes:
        num_frames (int): exact also with a variable frame rate, and in containers that do not store
            it, because the packets of the file are listed. This decodes nothing.
    """

    def __init__(self, path: str):
        self._container = av.open(path)
        if not self._container.streams.video:
            raise ValueError("it has no video stream")
        self._stream = self._container.streams.video[0]
        packets = [packet for packet in self._container.demux(self._stream) if packet.size]
        times = [packet.dts if packet.pts is None else packet.pts for packet in packets]
        keys = [time for packet, time in zip(packets, times) if packet.is_keyframe]
        self._times = sorted(times)
        self._index_of = {time: index for index, time in enumerate(self._times)}
        self._keys = sorted({self._index_of[time] for time in keys})
        self._index = None  # of the last decoded frame
        self.num_frames = len(times)
        in_header = self._stream.frames  # 0 if the container does not store it; not always exact
        if not times or self.num_frames < 0.9 * in_header:
            raise ValueError(f"truncated: {self.num_frames} of {in_header} frames are there")

    def frame(self, index: int) -> np.ndarray:
        """Return a frame, (H, W, 3), uint8, RGB. The index must be larger than at the last call."""
        key = self._keys[max(bisect_right(self._keys, index) - 1, 0)]
        if self._index is None or key > self._index:  # seek only where it saves decoding
            self._container.seek(self._times[key], stream=self._stream)
            self._frames, self._index = self._container.decode(self._stream), key - 1
        while self._index < index:
            frame = next(self._frames)
            self._index = self._index_of.get(frame.pts, self._index + 1)
        return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)

    def close(self) -> None:
        self._container.close()


class OpenCVReader:
    """Decode single frames of a file with OpenCV, which trusts the header of the file.

    Attributes:
        num_frames (int): as the header says, or the frame rate times the duration.
    """

    def __init__(self, path: str):
        self._capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
        self.num_frames = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if self.num_frames < 1:
            raise ValueError("it has no video stream, or no frame in it")
        self._index = None

    def frame(self, index: int) -> np.ndarray:
        """Return a frame, (H, W, 3), uint8, RGB. The index must be larger than at the last call."""
        if self._index is None:
            self._capture.set(cv2.CAP_PROP_POS_FRAMES, index)
            self._index = index - 1
        while self._index < index and self._capture.grab():
            self._index += 1
        decoded, frame = self._capture.retrieve()
        if self._index < index or not decoded:
            raise ValueError(f"frame {index} of {self.num_frames} is not there")
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def close(self) -> None:
        self._capture.release()


def read_frames(
    path: str,
    choose: Callable[[int], np.ndarray],
    transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> list[np.ndarray]:
    """Decode some frames of a video, with PyAV or, if that is not installed, with OpenCV.

    Args:
        path: a file that FFmpeg reads: mp4, avi, webm, mkv, ...
        choose: maps the number of frames to the indices of the wanted ones, in any order.
        transform: applied to each wanted frame, (H, W, 3), uint8, RGB, rotated for display.

    Returns:
        The transformed frames, in the order of the indices.

    Raises:
        VideoError: the file is missing or cannot be decoded.
    """
    frames = {}
    try:
        open(path, "rb").close()  # for a clear error
        with closing((OpenCVReader if av is None else PyAVReader)(path)) as reader:
            indices = choose(reader.num_frames).tolist()
            for index in sorted(set(indices)):
                frames[index] = transform(reader.frame(index))
    except Exception as error:  # decoders raise anything on broken files
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise VideoError(f"{path} cannot be decoded ({problem}); repair or remove it") from error
    return [frames[index] for index in indices]


class ClipMapper:
    """Map a dataset dict, ``{"file_name", "label", "video_id"}``, to an input of the model.

    The input is the dict with "clips": uint8, (V, 3, T, H, W), RGB. In training, and in evaluation
    with ``TEST.CLIP.PROTOCOL "jitter"``, there is V = 1 clip, at a random time with random scale,
    crop and flip. In evaluation they depend on the video alone.

    With "views", V = CLIPS * CROPS: clips at equal distances in time, the short side of the frames
    scaled to SIDE, and square crops of SIDE at equal distances along the long side, from one end to
    the other. With CROPS 1, the whole frame is one view.

    A video that is shorter than a clip is repeated ("loop"), or its last frame is ("hold").
    """

    def __init__(self, cfg: CfgNode, is_train: bool):
        self._clip, self._test = cfg.INPUT.CLIP, cfg.TEST.CLIP
        self._is_train = is_train
        for key, value, valid in (
            ("INPUT.CLIP.SHORT_VIDEO", self._clip.SHORT_VIDEO, ("loop", "hold")),
            ("TEST.CLIP.PROTOCOL", self._test.PROTOCOL, ("jitter", "views")),
        ):
            if value not in valid:
                raise OptionError(key, f"is {value!r}; valid are {' and '.join(map(repr, valid))}")
        if self._clip.MIN_SIDE[0] < self._clip.CROP:
            problem = f"is {self._clip.MIN_SIDE}, smaller than INPUT.CLIP.CROP, {self._clip.CROP}"
            raise OptionError("INPUT.CLIP.MIN_SIDE", problem)

    def __call__(self, dataset_dict: dict) -> dict:
        if not self._is_train and self._test.PROTOCOL == "views":
            clips = self._views(dataset_dict["file_name"])
        else:
            # TrainLoader seeds the global generators for each item.
            video_id = dataset_dict["video_id"].encode()
            seed = np.random.randint(2**31) if self._is_train else zlib.crc32(video_id)
            clips = self._jitter(dataset_dict["file_name"], np.random.default_rng(seed))[None]
        return {**dataset_dict, "clips": torch.from_numpy(clips)}

    def _jitter(self, path: str, rng: Generator) -> np.ndarray:
        side = rng.integers(*self._clip.MIN_SIDE, endpoint=True)
        time, y, x = rng.random(3)
        flip = self._clip.FLIP and rng.random() < 0.5
        frames = np.stack(
            read_frames(
                path,
                lambda count: self._indices(int(time * (self._room(count) + 1)), count),
                lambda frame: crop(resize(frame, side), self._clip.CROP, y, x),
            )
        )
        return np.ascontiguousarray((frames[:, :, ::-1] if flip else frames).transpose(3, 0, 1, 2))

    def _views(self, path: str) -> np.ndarray:
        clips, crops = self._test.CLIPS, self._test.CROPS

        def choose(count: int) -> np.ndarray:
            starts = np.linspace(0, self._room(count), clips + 2 * (clips == 1))
            starts = starts[1:2] if clips == 1 else starts
            return np.concatenate([self._indices(int(start), count) for start in starts])

        frames = np.stack(read_frames(path, choose, lambda f: resize(f, self._test.SIDE)))
        places = np.linspace(0, 1, crops) if crops > 1 else ()
        views = [crop(frames, self._test.SIDE, place, place) for place in places] or [frames]
        views = np.stack([view.reshape(clips, -1, *view.shape[1:]) for view in views], axis=1)
        return np.ascontiguousarray(views.reshape(-1, *views.shape[2:]).transpose(0, 4, 1, 2, 3))

    def _room(self, count: int) -> int:
        """Return the last frame at which a clip can start, in a video of ``count`` frames."""
        return max(count - self._clip.FRAMES * self._clip.STRIDE, 0)

    def _indices(self, start: int, count: int) -> np.ndarray:
        indices = start + self._clip.STRIDE * np.arange(self._clip.FRAMES)
        loop = self._clip.SHORT_VIDEO == "loop"
        return indices % count if loop else np.minimum(indices, count - 1)


def resize(frame: np.ndarray, side: int) -> np.ndarray:
    """Scale a frame, (H, W, 3), so that its short side has ``side`` pixels."""
    height, width = frame.shape[:2]
    scale = side / min(height, width)
    return cv2.resize(frame, (round(width * scale), round(height * scale)))


def crop(frames: np.ndarray, side: int, y: float, x: float) -> np.ndarray:
    """Return a square of frames, (..., H, W, 3); y and x in [0, 1] are its place in the room."""
    top, left = (int(place * (n - side + 0.999)) for place, n in zip((y, x), frames.shape[-3:-1]))
    return frames[..., top : top + side, left : left + side, :]
