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

cv2.setNumThreads(0)  # threads of a process do not survive in the workers that it forks


class VideoError(ImageError):
    """A video cannot be used. The message names the file."""


class PyAVReader:
    """Decode single frames of a file, with ascending indices, from the last key frame.

    The packets of the file are listed first, which decodes nothing. So the number and the indices
    of frames are exact in all containers, also with a variable frame rate.
    """

    def __init__(self, path: str):
        self._container = av.open(path)
        if not self._container.streams.video:
            raise ValueError("it has no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "NONE"  # the workers are the parallel part
        packets = [packet for packet in self._container.demux(self._stream) if packet.size]
        times = [packet.dts if packet.pts is None else packet.pts for packet in packets]
        self.num_frames, in_header = len(times), self._stream.frames  # 0 where it is not stored
        if not times or self.num_frames < 0.9 * in_header:
            raise ValueError(f"truncated: {self.num_frames} of {in_header} frames are there")
        self._times = sorted(times)
        self._index_of = {time: index for index, time in enumerate(self._times)}
        keys = {time for packet, time in zip(packets, times) if packet.is_keyframe}
        self._keys = sorted(self._index_of[time] for time in keys)
        self._index = None  # of the last decoded frame
        self._reformatter = av.video.reformatter.VideoReformatter()

    def frame(self, index: int) -> np.ndarray:
        key = self._keys[max(bisect_right(self._keys, index) - 1, 0)]
        if self._index is None or key > self._index:  # seek only where it saves decoding
            self._container.seek(self._times[key], stream=self._stream)
            self._frames, self._index = self._container.decode(self._stream), key - 1
        while self._index < index:
            frame = next(self._frames)
            self._index = self._index_of.get(frame.pts, self._index + 1)
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return np.rot90(rgb, frame.rotation // 90)

    def close(self) -> None:
        self._container.close()


class OpenCVReader:
    """The same with OpenCV, which trusts the number of frames in the header of the file."""

    def __init__(self, path: str):
        self._capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
        self.num_frames = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if self.num_frames < 1:
            raise ValueError("it has no video stream, or no frame in it")
        self._index = None

    def frame(self, index: int) -> np.ndarray:
        if self._index is None:
            self._capture.set(cv2.CAP_PROP_POS_FRAMES, index)
            self._index = index - 1
        while self._index < index and self._capture.grab():
            self._index += 1
        decoded, frame = self._capture.retrieve()
        if self._index < index or not decoded:
            raise ValueError(f"truncated: frame {index} of {self.num_frames} is not there")
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

    The input has also "clips", (V, 3, T, H, W), uint8, RGB. In training, and in evaluation with
    ``TEST.CLIP.PROTOCOL "jitter"``, it is V = 1 clip with random time, scale, crop and flip. In
    evaluation they depend on the video alone. With "views", V = CLIPS * CROPS: at equal distances
    in time, square crops of SIDE from one end of the long side to the other. With CROPS 1, whole
    frames.
    """

    def __init__(self, cfg: CfgNode, is_train: bool):
        self._clip, self._test = cfg.INPUT.CLIP, cfg.TEST.CLIP
        for key, value, valid in (
            ("INPUT.CLIP.SHORT_VIDEO", self._clip.SHORT_VIDEO, ("loop", "hold")),
            ("TEST.CLIP.PROTOCOL", self._test.PROTOCOL, ("jitter", "views")),
        ):
            if value not in valid:
                raise OptionError(key, f"is {value!r}; valid are {' and '.join(map(repr, valid))}")
        if self._clip.MIN_SIDE[0] < self._clip.CROP:
            problem = f"is {self._clip.MIN_SIDE}, smaller than INPUT.CLIP.CROP, {self._clip.CROP}"
            raise OptionError("INPUT.CLIP.MIN_SIDE", problem)
        self._is_train = is_train

    def __call__(self, dataset_dict: dict) -> dict:
        path = dataset_dict["file_name"]
        if not self._is_train and self._test.PROTOCOL == "views":
            clips = self._views(path)
        else:
            # TrainLoader seeds the global generators for each video.
            video_id = dataset_dict["video_id"].encode()
            seed = np.random.randint(2**31) if self._is_train else zlib.crc32(video_id)
            clips = self._jitter(path, np.random.default_rng(seed))
        clips = np.ascontiguousarray(clips.transpose(0, 4, 1, 2, 3))
        return {**dataset_dict, "clips": torch.from_numpy(clips)}

    def _jitter(self, path: str, rng: Generator) -> np.ndarray:
        side = rng.integers(*self._clip.MIN_SIDE, endpoint=True)
        time, y, x = rng.random(3)
        flip = self._clip.FLIP and rng.random() < 0.5
        frames = read_frames(
            path,
            lambda count: self._indices(int(time * (self._room(count) + 1)), count),
            lambda frame: crop(resize(frame, side), self._clip.CROP, y, x),
        )
        return np.stack(frames)[None, :, :, :: -1 if flip else 1]

    def _views(self, path: str) -> np.ndarray:
        places = np.linspace(0, 1, self._test.CLIPS) if self._test.CLIPS > 1 else [0.5]

        def choose(count: int) -> np.ndarray:
            starts = [int(place * self._room(count)) for place in places]
            return np.concatenate([self._indices(start, count) for start in starts])

        frames = np.stack(read_frames(path, choose, lambda f: resize(f, self._test.SIDE)))
        clips = frames.reshape(len(places), -1, *frames.shape[1:])
        if self._test.CROPS == 1:
            return clips
        places = np.linspace(0, 1, self._test.CROPS)
        crops = np.stack([crop(clips, self._test.SIDE, place, place) for place in places], axis=1)
        return crops.reshape(-1, *crops.shape[2:])

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
