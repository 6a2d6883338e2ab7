"""Decoding, sampling, list files, and bad input."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils.env import seed_all_rng
from nl_video import clips, data, load_config

from nl_detectron.errors import UserError

av = pytest.importorskip("av")
CODECS = {"mp4": "libx264", "avi": "mpeg4", "webm": "libvpx", "mkv": "libx264", "mov": "png"}
LEVELS = 6  # the grey level of frame i is LEVELS * i


def write(path, frames=40, size=(48, 32), rotate=False, step=lambda i: i):
    """Write a video whose frame i has the grey level LEVELS * i, and is bright at the top left."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix[1:]], rate=10)
        stream.width, stream.height, stream.bit_rate = *size, 4_000_000
        stream.pix_fmt = "rgb24" if path.suffix == ".mov" else "yuv420p"
        stream.codec_context.gop_size = 8
        stream.time_base = stream.codec_context.time_base = Fraction(1, 10)
        for i in range(frames):
            image = np.full((size[1], size[0], 3), LEVELS * i, np.uint8)
            image[: size[1] // 4, : size[0] // 4] = 255
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = step(i), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if rotate:  # the display matrix is in the track header
        content = bytearray(path.read_bytes())
        matrix = content.index(b"tkhd") + 44
        one = (1 << 16).to_bytes(4, "big")
        minus = (2**32 - (1 << 16)).to_bytes(4, "big")
        content[matrix : matrix + 20] = bytes(4) + one + bytes(4) + minus + bytes(4)
        path.write_bytes(content)
    return str(path)


def numbers(frames):
    return [round(float(np.median(frame)) / LEVELS) for frame in frames]


@pytest.fixture(params=["pyav", "opencv"])
def backend(request, monkeypatch):
    if request.param == "opencv":
        monkeypatch.setattr(clips, "av", None)
    return request.param


@pytest.mark.parametrize("suffix", CODECS)
def test_reads_exactly_the_chosen_frames(suffix, backend, tmp_path):
    path = write(tmp_path / f"video.{suffix}")
    counts = []

    def choose(count):
        counts.append(count)
        return np.array([31, 3, 4, 3, 39, 17])

    assert numbers(clips.read_frames(path, choose)) == [31, 3, 4, 3, 39, 17]
    assert counts == [40]
    assert numbers(clips.read_frames(path, lambda count: np.array([28]))) == [28]


def test_variable_frame_rate_does_not_change_the_numbers(tmp_path):
    path = write(tmp_path / "video.mp4", step=lambda i: i if i < 20 else 5 * i)
    assert numbers(clips.read_frames(path, lambda n: np.arange(n))) == list(range(40))
    assert numbers(clips.read_frames(path, lambda n: np.array([25]))) == [25]


def test_decodes_only_from_the_last_key_frame(tmp_path):
    reader = clips.PyAVReader(write(tmp_path / "video.mp4"))  # key frames: 0, 8, 16, 24, 32
    decoded = []

    class Spy(dict):
        def get(self, *key):
            decoded.append(self[key[0]])
            return decoded[-1]

    reader._index_of = Spy(reader._index_of)
    reader.frame(1)
    reader.frame(34)
    assert decoded == [0, 1, 32, 33, 34]


def test_rotation_is_applied(backend, tmp_path):
    (frame,) = clips.read_frames(
        write(tmp_path / "video.mp4", rotate=True), lambda n: np.array([5])
    )
    assert frame.shape == (48, 32, 3)
    assert frame[2, -3].min() > 200 > 100 > frame[2, 2].max()  # turned clockwise


@pytest.mark.parametrize("short,expected", [("loop", [0, 2, 1, 0]), ("hold", [0, 2, 2, 2])])
def test_short_videos_loop_or_hold(short, expected, backend, tmp_path):
    mapper = make_mapper("INPUT.CLIP.SHORT_VIDEO", short, "INPUT.CLIP.FRAMES", 4)
    video = {"file_name": write(tmp_path / "v.mp4", 3), "label": 0, "video_id": "v"}
    assert numbers(mapper(video)["clips"][0].numpy().transpose(1, 2, 3, 0)) == expected
    video["file_name"] = write(tmp_path / "v.mov", frames=1, size=(1, 1))
    assert mapper(video)["clips"].shape == (1, 3, 4, 24, 24)


def make_mapper(*options, is_train=True):
    return clips.ClipMapper(small_config(*options), is_train)


def small_config(*options):
    small = ("INPUT.CLIP.MIN_SIDE", (28, 32), "INPUT.CLIP.CROP", 24, "INPUT.CLIP.FRAMES", 8)
    return load_config("", [*small, "TEST.CLIP.SIDE", 28, "DATALOADER.NUM_WORKERS", 0, *options])


def test_training_clips_are_jittered_by_the_global_seed(tmp_path):
    video = {"file_name": write(tmp_path / "v.mp4"), "label": 0, "video_id": "v"}
    mapper, starts = make_mapper(), set()
    for seed in range(8):
        seed_all_rng(seed)
        clip = mapper(video)["clips"]
        seed_all_rng(seed)
        assert torch.equal(clip, mapper(video)["clips"])
        shown = numbers(clip[0].numpy().transpose(1, 2, 3, 0))
        assert shown == list(range(shown[0], shown[0] + 16, 2))
        starts.add(shown[0])
    assert len(starts) > 3 and max(starts) <= 40 - 16


def test_evaluation_clips_depend_on_the_video_alone(tmp_path):
    video = {"file_name": write(tmp_path / "v.mp4"), "label": 0, "video_id": "v"}
    mapper = make_mapper("TEST.CLIP.PROTOCOL", "jitter", is_train=False)
    assert torch.equal(mapper(video)["clips"], mapper(video)["clips"])


def test_views_are_all_clips_times_all_crops(tmp_path):
    video = {"file_name": write(tmp_path / "v.mp4", size=(64, 32)), "label": 0, "video_id": "v"}
    views = make_mapper("TEST.CLIP.CLIPS", 3, is_train=False)(video)["clips"]
    assert views.shape == (9, 3, 8, 28, 28)
    first_frames = views[:, :, 0].numpy().transpose(0, 2, 3, 1)
    assert numbers(first_frames[[2, 5, 8]]) == [0, 12, 24]  # the crop without the bright corner
    bright = first_frames[3:6, 2, 2, 0] > 200
    assert bright.tolist() == [True, False, False]  # left, middle and right
    whole = make_mapper("TEST.CLIP.CLIPS", 1, "TEST.CLIP.CROPS", 1, is_train=False)(video)["clips"]
    assert whole.shape == (1, 3, 8, 28, 56)


def test_batches_do_not_depend_on_where_training_starts(tmp_path):
    for label in range(2):
        (tmp_path / f"class{label}").mkdir()
        for number in range(3):
            write(tmp_path / f"class{label}/{number}.mp4")
    cfg = small_config("SEED", 7, "SOLVER.IMS_PER_BATCH", 2, "DATASETS.TRAIN", (str(tmp_path),))
    data.register_paths(cfg)

    def batches(start, stop):
        loader = data.build_train_loader(cfg)
        loader.start_iter = start
        return [batch for _, batch in zip(range(start, stop), loader)]

    for batch, other in zip(batches(0, 5)[3:], batches(3, 5), strict=True):
        for video, same in zip(batch, other, strict=True):
            assert video["video_id"] == same["video_id"]
            assert torch.equal(video["clips"], same["clips"])
    loader = data.build_test_loader(cfg, str(tmp_path))
    assert [video["video_id"] for batch in loader for video in batch] == [
        f"class{label}/{number}.mp4" for label in range(2) for number in range(3)
    ]
    DatasetCatalog.remove(str(tmp_path))


def bad_file(kind, folder):
    path = folder / "bad.mp4"
    if kind == "truncated":
        path.write_bytes(open(write(path), "rb").read()[:-900])
    elif kind == "cut":  # the index of the file is at its beginning
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for _ in range(40):
                noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
            container.mux(stream.encode(None))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            sound = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(sound, format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"not a video"}[kind])
    return path


@pytest.mark.parametrize("kind", ["missing", "truncated", "cut", "audio", "empty", "text"])
def test_bad_videos_are_named_or_skipped_with_a_count(kind, backend, tmp_path, caplog):
    write(tmp_path / "good.mp4")
    bad_file(kind, tmp_path)
    (tmp_path / "list.txt").write_text("good.mp4 1\nbad.mp4 0\n")
    name = str(tmp_path / "list.txt")
    cfg = small_config("DATASETS.TEST", (name,))
    data.register_paths(cfg)
    with pytest.raises(UserError, match=r"1 of 2 videos .*bad\.mp4"):
        data.check_videos(cfg, [name])
    data.check_videos(small_config("INPUT.CLIP.ON_BAD_VIDEO", "skip"), [name])
    assert "1 of 2 videos skipped" in caplog.text
    assert [video["video_id"] for video in DatasetCatalog.get(name)] == ["good.mp4"]
    DatasetCatalog.remove(name)


@pytest.mark.parametrize(
    "lines,problem",
    [
        ("v.mp4 0\nv.mp4\n", "line 2: 'v.mp4' is not a path and a label"),
        ("v.mp4 -1\n", "line 1: 'v.mp4 -1'"),
        ("", "not a list of videos"),
        ("v.mp4 0\nv.mp4 400\n", "v.mp4 has label 400, .* 0 to 399"),
    ],
)
def test_broken_lists_are_named(lines, problem, tmp_path):
    write(tmp_path / "v.mp4", 2)
    (tmp_path / "list.txt").write_text(lines)
    name = str(tmp_path / "list.txt")
    data.register_videos(name, name)
    with pytest.raises(UserError, match=problem):
        data.check_videos(small_config(), [name])
    DatasetCatalog.remove(name)


@pytest.mark.parametrize(
    "options",
    [("INPUT.CLIP.SHORT_VIDEO", "x"), ("TEST.CLIP.PROTOCOL", "x"), ("INPUT.CLIP.CROP", 99)],
)
def test_bad_options_are_named(options):
    with pytest.raises(UserError, match="(INPUT|TEST).CLIP"):
        make_mapper(*options)
