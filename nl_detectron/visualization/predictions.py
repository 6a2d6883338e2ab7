"""A trained model on images, folders and videos, as in detectron2's demo."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from .images import InputError, legible_scale, read

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
KEPT = {".jpeg", ".jpg", ".png"}  # suffixes of images that are kept; the others become PNGs
# Of the videos that are written. Every build of opencv has it; it cuts odd sides by one pixel.
CODEC = "mp4v"
FPS = 25.0  # where a video does not tell

Predictor = Callable[[np.ndarray], dict]  # of a BGR image, such as DefaultPredictor


def find_inputs(paths: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """The images and videos that are meant, and where each is to be drawn.

    Args:
        paths: files, and folders of files, from which images and videos are taken by suffix.
        folder: where drawings go, under the name of their input.

    Returns:
        Input -> file below ``folder``. Videos become .mp4, and images other than JPEG, .png.

    Raises:
        UserError: there is nothing at one of the paths, or two files would be drawn to the same
            place, or over an input.
    """
    inputs = []
    for path in paths:
        if path.is_dir():
            files = (f for f in sorted(path.iterdir()) if not f.name.startswith("."))
            found = [f for f in files if f.suffix.lower() in IMAGES | VIDEOS]
            if not found:
                raise UserError(f"--input: no image or video in the folder {path}")
            inputs += found
        elif path.is_file():
            inputs.append(path)
        else:
            raise UserError(f"--input: no file or folder {path}")

    outputs = {}
    for path in dict.fromkeys(inputs):
        output = folder / _output_name(path)
        if output in outputs.values():
            other = next(path for path in outputs if outputs[path] == output)
            raise UserError(f"--input: {other} and {path} would both be drawn to {output}")
        if any(output.resolve() == path.resolve() for path in inputs):
            raise UserError(f"--output {folder}: {output} is an input and would be overwritten")
        outputs[path] = output
    return outputs


def predict(
    outputs: Mapping[Path, Path],
    predictor: Predictor,
    metadata: Metadata,
    image_ids: Mapping[str, int | str],
) -> tuple[list[dict], list[str]]:
    """Draw what the model finds. What cannot be read is said, and the others go on.

    Args:
        outputs: as :func:`find_inputs` gives them.
        metadata: class names, and ``thing_dataset_id_to_contiguous_id`` for category ids; without
            it they are the model's own, from 0.
        image_ids: file name -> id. Of other images the id is the file name, without its suffix
            and as a number if it is one, as COCO's are. Frames have "<file name>/<number>", from 0.

    Returns:
        The detections as COCO results, and the inputs that cannot be read, a line for each.

    Raises:
        UserError: opencv cannot write videos here.
    """
    categories = metadata.get("thing_dataset_id_to_contiguous_id", {})
    categories = {contiguous: category for category, contiguous in categories.items()}
    results, failures = [], []
    with tqdm(total=sum(map(_count, outputs)), desc="predicting", unit="image") as progress:
        for path, output in outputs.items():
            draw = _draw_video if _is_video(path) else _draw_image
            try:
                for frame, predictions in draw(path, output, predictor, metadata):
                    if "instances" in predictions:
                        instances = predictions["instances"].to("cpu")
                        image_id = _image_id(path, frame, image_ids)
                        results += instances_to_coco_json(instances, image_id)
                    progress.update()
            except InputError as error:
                failures.append(str(error))
                tqdm.write(f"error: {error}", file=sys.stderr)
    for result in results:
        result["category_id"] = categories.get(result["category_id"], result["category_id"])
    return results, failures


def _draw_image(
    path: Path, output: Path, predictor: Predictor, metadata: Metadata
) -> Iterator[tuple[int, dict]]:
    image = read(path, "BGR")
    predictions = predictor(image)
    method, arguments = _drawing(predictions)
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale=legible_scale(image))
    drawn = getattr(visualizer, method)(*arguments).get_image()
    Image.fromarray(drawn).save(output, quality=95)
    yield 0, predictions


def _draw_video(
    path: Path, output: Path, predictor: Predictor, metadata: Metadata
) -> Iterator[tuple[int, dict]]:
    video, visualizer = cv2.VideoCapture(str(path)), VideoVisualizer(metadata)
    count, writer = 0, None
    try:
        while True:
            more, frame = video.read()
            if not more:
                break
            predictions = predictor(frame)
            method, arguments = _drawing(predictions)
            drawn = getattr(visualizer, method)(frame[:, :, ::-1], *arguments).get_image()
            if writer is None:
                height, width = drawn.shape[:2]
                fps = video.get(cv2.CAP_PROP_FPS) or FPS
                codec = cv2.VideoWriter_fourcc(*CODEC)
                writer = cv2.VideoWriter(str(output), codec, fps, (width, height))
                if not writer.isOpened():
                    raise UserError(f"--output: opencv cannot write {output} as {CODEC}")
            writer.write(np.ascontiguousarray(drawn[:, :, ::-1]))
            yield count, predictions
            count += 1
    finally:
        video.release()
        if writer is not None:
            writer.release()
    if not count:
        raise InputError(f"{path} cannot be read (opencv finds no frame of a video in it)")
    if count < _count(path):  # no error: in some formats the header has an estimate
        note = f"note: {path}: {count} frames, where its header says {_count(path)}"
        tqdm.write(note, file=sys.stderr)


def _drawing(predictions: dict) -> tuple[str, tuple]:
    """The method of Visualizer, and of VideoVisualizer after the frame, with its arguments."""
    if "panoptic_seg" in predictions:
        segments, infos = predictions["panoptic_seg"]
        return "draw_panoptic_seg_predictions", (segments.to("cpu"), infos)
    if "instances" in predictions:
        return "draw_instance_predictions", (predictions["instances"].to("cpu"),)
    return "draw_sem_seg", (predictions["sem_seg"].argmax(dim=0).to("cpu"),)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def _output_name(path: Path) -> str:
    if _is_video(path):
        return f"{path.stem}.mp4"
    return path.name if path.suffix.lower() in KEPT else f"{path.stem}.png"


def _image_id(path: Path, frame: int, image_ids: Mapping[str, int | str]) -> int | str:
    if _is_video(path):
        return f"{path.name}/{frame}"
    own = int(path.stem) if path.stem.isdecimal() else path.name
    return image_ids.get(path.name, own)


def _count(path: Path) -> int:
    """How many images the file holds, as far as it tells."""
    if not _is_video(path):
        return 1
    video = cv2.VideoCapture(str(path))
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    video.release()
    return max(count, 0)
