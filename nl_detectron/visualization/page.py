"""A page that shows what blocks look at from wherever the pointer is.

One file, for any browser since 2023: it fetches nothing and needs no server. What it consists of
lies beside this file, in ``page/``.
"""

import base64
import html
import io
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Instances
from PIL import Image
from torch import Tensor

from .attention import Attention, ImageGeometry
from .names import detection_labels

PARTS = Path(__file__).parent / "page"
MAPS_BYTES = 6_000_000  # of all blocks, before compression: in base64 at most 8 MB of the 10
STRONGEST = 20  # exact weights of each query, as many as the paper's Fig. 3 has arrows
LEVELS = 127  # of a weight, to either side of zero
IMAGE_SIDE = 1344  # pixels; a larger image is shrunk
CHUNK = 1024  # queries whose rows are there at a time


def attention_page(
    attention: Attention,
    name: str,
    instances: Instances | None = None,
    class_names: Sequence[str] = (),
) -> str:
    """The page of one image, below 10 MB.

    All positions of a block are queries, unless the maps of all blocks would be too large: then
    every second in both directions, or every third, and so on; the page says so.

    Args:
        attention: of any blocks.
        name: of the image, for the reader.
        instances: detections that can be shown over the image; the first is the first query.
        class_names: of the model, in the order of its classes; by default numbers are shown.

    Returns:
        HTML.

    Raises:
        ValueError: a block has weights that are not finite.
    """
    height, width = attention.image.shape[:2]
    share = MAPS_BYTES // len(attention.names)
    detections = _detections(instances, class_names) if instances is not None else []
    start = width / 2, height / 2
    if detections:
        x0, y0, x1, y1 = detections[0]["box"]
        start = (x0 + x1) / 2, (y0 + y1) / 2
    data = {
        "image": {
            "name": name,
            "source": _jpeg(attention.image),
            "width": width,
            "height": height,
        },
        "blocks": [_block(attention, block, share) for block in attention.names],
        "detections": detections,
        "start": start,  # the first query, x and y
    }
    page = (PARTS / "page.html").read_text("utf-8")
    for key, text in {
        "title": html.escape(f"What non-local blocks look at: {name}"),
        "style": (PARTS / "page.css").read_text("utf-8"),
        "script": (PARTS / "page.js").read_text("utf-8"),
        "data": json.dumps(data).replace("<", "\\u003c"),  # last: nothing is replaced in it
    }.items():
        page = page.replace(f"{{{{ {key} }}}}", text)
    return page


def _block(attention: Attention, name: str, max_bytes: int) -> dict:
    """What the page needs of a block.

    Returns:
        ``queries`` and ``keys``: see ``_grid``. ``strongest``: how many weights of a query are
        exact. ``signed``: whether weights can be negative. ``about``: what to tell the reader.
        ``data``: the arrays that page.js unpacks, deflated, in base64.
    """
    recorder, of_keys = attention.recorder, attention.geometry[name]
    block, map_size = recorder.blocks[name], recorder.map_size(name)
    of_queries = replace(of_keys, key_size=map_size, key_stride=of_keys.stride)

    shown = _shown(of_keys)
    count = min(STRONGEST, len(shown[0]) * len(shown[1]))
    bytes_per_query = len(shown[0]) * len(shown[1]) + 8 * count + 4
    every = 1
    while math.prod(map(len, _shown(of_queries, every))) * bytes_per_query > max_bytes:
        every += 1
    positions = torch.cartesian_prod(*_shown(of_queries, every))

    chunks = [
        _measure(recorder.rows(name, some), of_keys, count) for some in positions.split(CHUNK)
    ]
    arrays = [torch.cat(parts).numpy() for parts in zip(*chunks)]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(f"{name} has weights that are not finite")
    packed = zlib.compress(b"".join(array.tobytes() for array in arrays), 9)

    about = f"{name}: {block.instantiation}, {_times(map_size)} positions"
    if block.subsample != "none":
        about += f", which look at {_times(of_keys.key_size)} (sub-sampling {block.subsample})"
    if every > 1:
        about += (
            ". The maps of all positions would make this page too large: it has that of the middle "
            f"one of every {every} x {every}"
        )
    return {
        "name": name,
        "about": about + ".",
        "signed": block.instantiation == "dot_product",
        "strongest": count,
        "queries": _grid(of_queries, every),
        "keys": _grid(of_keys),
        "data": base64.b64encode(packed).decode(),
    }


def _shown(geometry: ImageGeometry, every: int = 1) -> tuple[Tensor, Tensor]:
    """Rows and columns of the keys that cover any of the image; the middle one of ``every``."""
    in_image = geometry.in_image()
    sides = in_image.any(1), in_image.any(0)
    return tuple(_middles(int(side.sum()), every) for side in sides)


def _middles(count: int, every: int) -> Tensor:
    return (torch.arange(0, count, every) + every // 2).clamp(max=count - 1)


def _grid(geometry: ImageGeometry, every: int = 1) -> dict:
    """Where keys lie: ``y`` of each row, ``x`` of each column, width and height of a ``cell``.

    Everything in pixels of the image. A cell at its edges may reach beyond it.
    """
    rows, columns = _shown(geometry, every)
    (height, width), (resized_height, resized_width) = geometry.image_size, geometry.resized_size
    side = geometry.key_stride * every
    return {
        "y": geometry.points(torch.cartesian_prod(rows, columns[:1]))[:, 1].tolist(),
        "x": geometry.points(torch.cartesian_prod(rows[:1], columns))[:, 0].tolist(),
        "cell": [side * width / resized_width, side * height / resized_height],
    }


def _measure(rows: Tensor, geometry: ImageGeometry, count: int) -> tuple[Tensor, ...]:
    """(K, Hm, Wm) weights -> what the page keeps of them.

    Returns:
        Of the ``count`` keys in the image with the largest magnitude, the largest first: which,
        (K, count) int32, in row-major order of those in the image; and the weights, float32. Share
        of padding, (K) float32. Levels, (K, M) int8: sign(w) * LEVELS * sqrt(|w| / largest |w|).
    """
    padding = geometry.padding_share(rows)
    height, width = map(len, _shown(geometry))
    weights = rows[:, :height, :width].flatten(1)
    order = weights.abs().argsort(dim=1, descending=True, stable=True)[:, :count]
    strongest = weights.gather(1, order)
    largest = strongest[:, :1].abs().clamp(min=torch.finfo(weights.dtype).tiny)
    levels = weights.sign() * (LEVELS * (weights.abs() / largest).sqrt()).round()
    return order.int(), strongest.float(), padding.float(), levels.to(torch.int8)


def _detections(instances: Instances, class_names: Sequence[str]) -> list[dict]:
    """Boxes, in pixels of the image, and their labels."""
    boxes, labels = instances.pred_boxes.tensor.tolist(), detection_labels(instances, class_names)
    return [{"box": box, "label": label} for box, label in zip(boxes, labels)]


def _jpeg(image: np.ndarray) -> str:
    """(H, W, 3), BGR, as a data URI."""
    picture = Image.fromarray(image[:, :, ::-1])
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _times(size: tuple[int, int]) -> str:
    return " x ".join(map(str, size))
