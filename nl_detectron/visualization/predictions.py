"""Run a model on images, folders and videos, and draw its predictions."""

import os
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
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
from .figure import legible_scale, use_fonts

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
THRESHOLDS = (  # config keys of the lowest score of a prediction
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.RETINANET.SCORE_THRESH_TEST",
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
)


def read_image(path: Path, format: str = "BGR") -> np.ndarray:
    """Read an image as (H, W, 3), uint8, or raise UserError."""
    try:
        return detection_utils.read_image(str(path), format)
    except Exception as error:  # decoders raise many types of errors on broken files
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())})") from error


def find_inputs(paths: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Return the output file in ``folder`` of each image and video; ``paths`` may be folders."""
    outputs = {}
    for path in paths:
        files = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
        inputs = [f for f in files if f.is_file() and f.suffix.lower() in IMAGES | VIDEOS]
        if not inputs:
            raise UserError(f"--input {path}: no image or video")
        for file in inputs:
            suffix = ".mp4" if file.suffix.lower() in VIDEOS else ".jpg"
            outputs[file] = folder / f"{file.stem}{suffix}"
    if len(set(outputs.values())) < len(outputs):
        raise UserError("--input: two files have the same name, and would have the same output")
    if {file.resolve() for file in outputs} & {file.resolve() for file in outputs.values()}:
        raise UserError(f"--output {folder}: an input would be overwritten")
    return outputs


def find_image_ids(images: Sequence[dict], inputs: Iterable[Path]) -> dict[Path, int]:
    """Return input -> id of the image whose ``file_name`` has the most parts in common with it."""
    candidates = defaultdict(list)  # by the file name without folders
    for image in images:
        candidates[_parts(image["file_name"])[0]].append(image)
    image_ids = {}
    for path in inputs:
        parts = _parts(str(path.absolute()))
        found = candidates[parts[0]]
        common = [len(os.path.commonprefix([parts, _parts(i["file_name"])])) for i in found]
        if common.count(max(common, default=0)) > 1:
            names = " or ".join(image["file_name"] for image in found)
            raise UserError(f"--input {path}: --annotations has {names}; the path must end in one")
        if found:
            image_ids[path] = found[common.index(max(common))]["id"]
    if len(set(image_ids.values())) < len(image_ids):
        raise UserError("--input: two files are the same image of --annotations")
    return image_ids


def _parts(path: str) -> list[str]:
    """Split a path from its end. The same name can have two forms in Unicode."""
    return unicodedata.normalize("NFC", path).split("/")[::-1]


def predict(
    outputs: dict[Path, Path], predictor: DefaultPredictor, metadata: Metadata, image_ids: dict
) -> tuple[list[dict], int]:
    """Draw the predictions for all inputs; report and skip those that cannot be read.

    An input has the image id that :func:`find_image_ids` has found, or else its file name, or its
    number as in COCO, such as 42 for "000042.jpg". The id of a frame is "<file name>/<number>".
    Return the detections as COCO results, and the number of inputs that could not be read.
    """
    categories = metadata.get("thing_dataset_id_to_contiguous_id", {})
    category_ids = {contiguous: category for category, contiguous in categories.items()}
    results, failures = [], 0
    for path, output in tqdm(outputs.items(), desc="predicting", unit="file"):
        image_id = image_ids.get(path, int(path.stem) if path.stem.isdecimal() else path.name)
        draw = _draw_video if output.suffix == ".mp4" else _draw_image
        try:
            for frame, predictions in enumerate(draw(path, output, predictor, metadata)):
                if "instances" in predictions:
                    key = f"{path.name}/{frame}" if draw is _draw_video else image_id
                    results += instances_to_coco_json(predictions["instances"].to("cpu"), key)
        except UserError as error:
            failures += 1
            tqdm.write(f"error: {error}", file=sys.stderr)
    for result in results:
        result["category_id"] = category_ids.get(result["category_id"], result["category_id"])
    return results, failures


def _draw_image(path: Path, output: Path, predictor, metadata: Metadata) -> Iterator[dict]:
    image = read_image(path)
    predictions = predictor(image)
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale=legible_scale(image))
    Image.fromarray(_draw(predictions, visualizer)).save(output, quality=95)
    yield predictions


def _draw_video(path: Path, output: Path, predictor, metadata: Metadata) -> Iterator[dict]:
    video, visualizer, writer = cv2.VideoCapture(str(path)), VideoVisualizer(metadata), None
    while (frame := video.read()[1]) is not None:
        predictions = predictor(frame)
        drawn = _draw(predictions, visualizer, frame[:, :, ::-1])
        if writer is None:
            codec = cv2.VideoWriter_fourcc(*"mp4v")  # every opencv has it
            fps = video.get(cv2.CAP_PROP_FPS) or 25.0
            writer = cv2.VideoWriter(str(output), codec, fps, drawn.shape[1::-1])
        writer.write(np.ascontiguousarray(drawn[:, :, ::-1]))
        yield predictions
    if writer is None:
        raise UserError(f"{path} cannot be read (opencv finds no video frame in it)")
    writer.release()


def _draw(predictions: dict, visualizer: Visualizer | VideoVisualizer, *frame) -> np.ndarray:
    """Draw the output of any detectron2 model, in RGB. VideoVisualizer needs the frame."""
    if "panoptic_seg" in predictions:
        segments, infos = predictions["panoptic_seg"]
        drawn = visualizer.draw_panoptic_seg_predictions(*frame, segments.to("cpu"), infos)
    elif "instances" in predictions:
        drawn = visualizer.draw_instance_predictions(*frame, predictions["instances"].to("cpu"))
    else:
        drawn = visualizer.draw_sem_seg(*frame, predictions["sem_seg"].argmax(dim=0).to("cpu"))
    use_fonts(drawn.fig)
    return drawn.get_image()
