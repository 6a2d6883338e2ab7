"""Run a model on images, folders and videos, and draw its predictions."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import Metadata, detection_utils
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from .figure import legible_scale

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
OUTPUT_IMAGES = {".jpeg", ".jpg", ".png"}  # other images are written as .png
CODEC, FPS = "mp4v", 25.0  # every opencv has this codec; FPS is for videos that do not state theirs


class InputError(UserError):
    """An image or a video cannot be read; the message names it."""


def read_image(path: Path, format: str = "BGR") -> np.ndarray:
    """Read an image as (H, W, 3), uint8, or raise InputError."""
    try:
        return detection_utils.read_image(str(path), format)
    except Exception as error:  # decoders raise many types of errors on broken files
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path} cannot be read ({problem})") from error


def find_inputs(paths: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Return the output file, in ``folder``, of each input file.

    The inputs are files, and the images and videos in folders. Output videos are .mp4, and images
    other than JPEG become .png.

    Raises:
        UserError: a path does not exist or holds no input, two inputs have the same output, or an
            output would overwrite an input.
    """
    inputs = []
    for path in paths:
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if not file.name.startswith(".")]
            found = [file for file in files if file.suffix.lower() in IMAGES | VIDEOS]
            if not found:
                raise UserError(f"--input: no image or video in the folder {path}")
            inputs += found
        elif path.is_file():
            inputs.append(path)
        else:
            raise UserError(f"--input: no file or folder {path}")
    outputs, resolved = {}, {path.resolve() for path in inputs}
    for path in dict.fromkeys(inputs):
        suffix = path.suffix if path.suffix.lower() in OUTPUT_IMAGES else ".png"
        output = folder / f"{path.stem}{'.mp4' if _is_video(path) else suffix}"
        if output in outputs.values():
            other = next(path for path in outputs if outputs[path] == output)
            raise UserError(f"--input: {other} and {path} would both be written to {output}")
        if output.resolve() in resolved:
            raise UserError(f"--output {folder}: {output} is an input and would be overwritten")
        outputs[path] = output
    return outputs


def predict(
    outputs: Mapping[Path, Path],
    predictor: DefaultPredictor,
    metadata: Metadata,
    image_ids: Mapping[str, int | str],
) -> tuple[list[dict], list[str]]:
    """Draw the predictions for all inputs. Inputs that cannot be read are reported and skipped.

    Args:
        outputs: input file -> output file, from :func:`find_inputs`.
        predictor: detectron2's predictor of a model.
        metadata: class names, and ``thing_dataset_id_to_contiguous_id`` for category ids.
        image_ids: file name -> image id. By default, the id is the file name, or its number as in
            COCO, such as 42 for "000042.jpg". The id of a frame is "<file name>/<number>".

    Returns:
        The detections as COCO results, and one message per input that could not be read.
    """
    categories = metadata.get("thing_dataset_id_to_contiguous_id", {})
    category_ids = {contiguous: category for category, contiguous in categories.items()}
    results, failures = [], []
    for path, output in tqdm(outputs.items(), desc="predicting", unit="file"):
        image_id = image_ids.get(path.name, int(path.stem) if path.stem.isdecimal() else path.name)
        predict_file = _predict_video if _is_video(path) else _predict_image
        try:
            for frame, predictions in enumerate(predict_file(path, output, predictor, metadata)):
                if _is_video(path):
                    image_id = f"{path.name}/{frame}"
                if "instances" in predictions:
                    instances = predictions["instances"].to("cpu")
                    results += instances_to_coco_json(instances, image_id)
        except InputError as error:
            failures.append(str(error))
            tqdm.write(f"error: {error}", file=sys.stderr)
    for result in results:
        result["category_id"] = category_ids.get(result["category_id"], result["category_id"])
    return results, failures


def _predict_image(
    path: Path, output: Path, predictor: DefaultPredictor, metadata: Metadata
) -> Iterator[dict]:
    """Draw an image and yield its predictions."""
    image = read_image(path)
    predictions = predictor(image)
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale=legible_scale(image))
    Image.fromarray(_draw(predictions, visualizer)).save(output, quality=95)
    yield predictions


def _predict_video(
    path: Path, output: Path, predictor: DefaultPredictor, metadata: Metadata
) -> Iterator[dict]:
    """Draw a video and yield the predictions for each frame."""
    video, visualizer, writer = cv2.VideoCapture(str(path)), VideoVisualizer(metadata), None
    while (frame := video.read()[1]) is not None:
        predictions = predictor(frame)
        drawn = _draw(predictions, visualizer, frame[:, :, ::-1])
        if writer is None:
            fps = video.get(cv2.CAP_PROP_FPS) or FPS
            codec, (height, width) = cv2.VideoWriter_fourcc(*CODEC), drawn.shape[:2]
            writer = cv2.VideoWriter(str(output), codec, fps, (width, height))
            if not writer.isOpened():
                raise UserError(f"--output: opencv cannot write {output} as {CODEC}")
        writer.write(np.ascontiguousarray(drawn[:, :, ::-1]))
        yield predictions
    video.release()
    if writer is None:
        raise InputError(f"{path} cannot be read (opencv finds no video frame in it)")
    writer.release()


def _draw(predictions: dict, visualizer: Visualizer | VideoVisualizer, *frame) -> np.ndarray:
    """Draw the output of any detectron2 model, in RGB. VideoVisualizer needs the frame."""
    if "panoptic_seg" in predictions:
        segments, infos = predictions["panoptic_seg"]
        drawn = visualizer.draw_panoptic_seg_predictions(*frame, segments.to("cpu"), infos)
    elif "instances" in predictions:
        instances = predictions["instances"].to("cpu")
        drawn = visualizer.draw_instance_predictions(*frame, instances)
    else:
        drawn = visualizer.draw_sem_seg(*frame, predictions["sem_seg"].argmax(dim=0).to("cpu"))
    return drawn.get_image()


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS
