"""Decoding, sampling, list files, and bad input."""

import wave
from argparse import Namespace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from detectron2.utils.env import seed_all_rng
from nl_video import clips, data, load_config
from nl_video.trainer import VideoTrainer

from nl_detectron.errors import UserError

CODECS = {"webm": "libvpx", "mov": "png", **dict.fromkeys(("mp4", "avi", "mkv", "ts"), "libx264")}
LEVELS = 6  # the grey level of frame i is LEVELS * i
TURN = (0, 1 << 16, 0, 2**32 - (1 << 16), 0)  # numbers of a display matrix: by 90 degrees


def write(path, frames=40, size=(48, 32), step=lambda i: i, turned=False):
    """Write a video whose frame i has the grey level LEVELS * i, and is bright at the top left."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=10)
        stream.width, stream.height, stream.bit_rate = *size, 4_000_000
        stream.pix_fmt = "rgb24" if path.suffix == ".mov" else "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 8, 2
        stream.time_base = stream.codec_context.time_base = Fraction(1, 10)
        for i in range(frames):
            image = np.full((size[1], size[0], 3), LEVELS * i, np.uint8)
            image[: size[1] // 4, : size[0] // 4] = 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = step(i), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if turned:  # the display matrix is in the track header
        content = path.read_bytes()
        at, turn = content.index(b"tkhd") + 44, b"".join(n.to_bytes(4, "big") for n in TURN)
        path.write_bytes(content[:at] + turn + content[at + 20 :])
    return str(path)


def numbers(frames):
    return [round(float(np.median(frame)) / LEVELS) for frame in frames]


@pytest.fixture(params=["pyav", "opencv"])
def backend(request, monkeypatch):
    if request.param == "opencv":
        monkeypatch.setattr(clips, "av", None)


@pytest.mark.parametrize("suffix", CODECS)
def test_reads_exactly_the_chosen_frames(suffix, tmp_path):
    path = write(tmp_path / f"video.{suffix}")
    for chosen in ([31, 3, 4, 3, 39, 17], *([i] for i in range(25, 40))):
        assert numbers(clips.read_frames(path, lambda n, c=chosen: np.array(c))) == chosen
    assert len(clips.read_frames(path, np.arange)) == 40


@pytest.mark.parametrize("suffix", ["mp4", "webm", "mkv"])
def test_reads_the_chosen_frames_without_pyav(suffix, tmp_path, monkeypatch):
    path = write(tmp_path / f"video.{suffix}")
    monkeypatch.setattr(clips, "av", None)
    for chosen in ([31, 3, 4, 3, 39, 17], [28]):
        assert numbers(clips.read_frames(path, lambda n, c=chosen: np.array(c))) == chosen


def test_variable_frame_rate_does_not_change_the_numbers(tmp_path):
    path = write(tmp_path / "video.mp4", step=lambda i: i if i < 20 else 5 * i)
    assert numbers(clips.read_frames(path, np.arange)) == list(range(40))
    assert numbers(clips.read_frames(path, lambda n: np.array([25]))) == [25]


def test_frames_before_a_cut_are_not_counted(tmp_path):
    path = tmp_path / "video.mp4"
    content = bytearray(open(write(path), "rb").read())
    at = content.index(b"elst") + 16
    start = int.from_bytes(content[at : at + 4], "big") + 12 * 1024  # in units of 1 / 10240 s
    content[at - 4 : at + 4] = (2800).to_bytes(4, "big") + start.to_bytes(4, "big")  # 2800 ms
    path.write_bytes(content)
    assert numbers(clips.read_frames(str(path), np.arange)) == list(range(12, 40))
    assert numbers(clips.read_frames(str(path), lambda n: np.array([1]))) == [13]


def test_decodes_only_from_the_last_key_frame(tmp_path):
    path = tmp_path / "video.mp4"
    content = open(write(path), "rb").read()  # key frames: 0, 8, 16, 24, 32
    with av.open(str(path)) as container:
        first, last = [p.pos for p in container.demux(video=0) if p.is_keyframe][::4]
    path.write_bytes(content[:first] + bytes(last - first) + content[last:])
    assert numbers(clips.read_frames(str(path), lambda n: np.array([36, 34]))) == [36, 34]
    with pytest.raises(UserError):
        clips.read_frames(str(path), lambda n: np.array([30, 34]))


def test_rotation_is_applied(backend, tmp_path):
    path = write(tmp_path / "video.mp4", turned=True)
    (frame,) = clips.read_frames(path, lambda n: np.array([5]))
    assert frame.shape == (48, 32, 3)
    assert frame[2, -3].min() > 200 > 100 > frame[2, 2].max()  # turned clockwise


def small_config(*options):
    small = ("INPUT.CLIP.MIN_SIDE", (28, 32), "INPUT.CLIP.CROP", 24, "INPUT.CLIP.FRAMES", 8)
    return load_config("", [*small, "TEST.CLIP.SIDE", 28, "DATALOADER.NUM_WORKERS", 0, *options])


def map_video(path, *options, is_train=True):
    mapper = clips.ClipMapper(small_config(*options), is_train)
    views = mapper({"file_name": path, "label": 0, "video_id": "v"})["clips"]
    return views, numbers(views[0].numpy().transpose(1, 2, 3, 0))


@pytest.mark.parametrize("short, expected", [("loop", [0, 2, 1, 0]), ("hold", [0, 2, 2, 2])])
def test_short_videos_loop_or_hold(short, expected, backend, tmp_path):
    options = ["INPUT.CLIP.SHORT_VIDEO", short, "INPUT.CLIP.FRAMES", 4]
    assert map_video(write(tmp_path / "v.mp4", 3), *options)[1] == expected
    views, _ = map_video(write(tmp_path / "v.mov", frames=1, size=(1, 1)), *options)
    assert views.shape == (1, 3, 4, 24, 24)


def test_jitter_depends_on_the_seed_in_training_and_on_the_video_in_evaluation(tmp_path):
    path, starts = write(tmp_path / "v.mp4"), set()
    for seed in [0, 0, *range(1, 8)]:
        seed_all_rng(seed)
        _, shown = map_video(path)
        assert shown == list(range(shown[0], shown[0] + 16, 2))
        starts.add(shown[0])
    assert 3 < len(starts) < 9 and max(starts) <= 40 - 16
    jitter = [map_video(path, "TEST.CLIP.PROTOCOL", "jitter", is_train=False) for _ in range(2)]
    assert torch.equal(jitter[0][0], jitter[1][0])


def test_views_are_all_clips_times_all_crops(tmp_path):
    path = write(tmp_path / "v.mp4", size=(64, 32))
    views, _ = map_video(path, "TEST.CLIP.CLIPS", 3, is_train=False)
    assert views.shape == (9, 3, 8, 28, 28)
    first_frames = views[:, :, 0].numpy().transpose(0, 2, 3, 1)
    assert numbers(first_frames[6:]) == [0, 12, 24]  # the crop without the bright corner
    assert (first_frames[1::3, 2, 2, 0] > 200).tolist() == [True, False, False]  # left to right


def check(name, *options):
    cfg = small_config("DATASETS.TEST", (name,), *options)
    return VideoTrainer.check_datasets(cfg, Namespace(eval_only=True), [])


def test_a_folder_has_a_subfolder_for_each_class(tmp_path):
    for path in ("fall/1.mp4", "rise/b.MP4", "rise/notes.txt", ".hidden/1.mp4"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    found = {video["video_id"]: video["label"] for video in data.read_videos(tmp_path)}
    assert found == {"fall/1.mp4": 0, "rise/b.MP4": 1}
    with pytest.raises(UserError, match="NUM_CLASSES is 400, but .* has 2"):
        check(str(tmp_path))


def test_paths_in_lists_may_have_any_characters(tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeffa b/\u89c6.mp4 0\r\n\r\n\u00e9.mp4 \t1\r\n".encode())
    found = {video["video_id"]: video["label"] for video in data.read_videos(tmp_path / "list.txt")}
    assert found == {"a b/\u89c6.mp4": 0, "\u00e9.mp4": 1}


def write_bad(path):
    if path.stem == "audio":
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(bytes(16000))
    elif path.stem != "missing":
        content = open(write(path), "rb").read()
        half = content[: len(content) // 2]
        path.write_bytes({"cut": half, "label": content, "empty": b"", "text": b"text"}[path.stem])


@pytest.mark.parametrize(
    "bad", ["missing.mp4", "cut.mp4", "cut.avi", "audio.wav", "empty.mp4", "text.mp4", "label.mp4"]
)
def test_bad_videos_are_named_or_skipped_with_a_count(bad, backend, tmp_path, caplog):
    write(tmp_path / "good.mp4")
    write_bad(tmp_path / bad)
    name = tmp_path / "list.txt"
    name.write_text(f"good.mp4 1\n{bad} {400 if bad == 'label.mp4' else 0}\n")
    with pytest.raises(UserError, match=f"1 of 2 videos .*{bad}"):
        check(str(name))
    (dataset,) = check(str(name), "INPUT.CLIP.ON_BAD_VIDEO", "skip")
    assert "1 of 2 videos skipped" in caplog.text
    assert [video["video_id"] for video in dataset.load()] == ["good.mp4"]


@pytest.mark.parametrize(
    "lines, problem",
    [(b"v.mp4 0\nv.mp4 -1\n", "line 2: 'v.mp4 -1'"), (b"", "not a list"), (b"\xe9 0", "UTF-8")],
)
def test_broken_lists_are_named(lines, problem, tmp_path):
    (tmp_path / "list.txt").write_bytes(lines)
    with pytest.raises(UserError, match=problem):
        data.read_videos(tmp_path / "list.txt")
