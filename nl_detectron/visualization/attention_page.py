"""An interactive HTML page: attention maps of the position under the pointer.

The page is a single file that loads nothing else. It is made of the files in ``assets/``.
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

ASSETS = Path(__file__).parent / "assets"
MAPS_BYTES = 6_000_000  # of all blocks, before compression; at most 8 MB in base64
STRONGEST = 20  # exact weights stored per query, as many as the paper's Fig. 3 has arrows
LEVELS = 127  # quantisation steps of a weight, on either side of zero
IMAGE_SIDE = 1344  # pixels; a larger image is shrunk
CHUNK = 1024  # query positions processed at a time


def attention_page(
    attention: Attention,
    name: str,
    instances: Instances | None = None,
    class_names: Sequence[str] = (),
) -> str:
    """Return the page of one image, smaller than 10 MB.

    If the maps of all query positions would be too large, the page has those of every n-th
    position in both directions, and says so.

    Args:
        attention: returned by :func:`attend`.
        name: name of the image, shown on the page.
        instances: detections that the page can show; the first one is the initial query.
        class_names: names of the classes; by default the page shows class numbers.
    """
    height, width = attention.image.shape[:2]
    detections, start = [], (width / 2, height / 2)
    if instances is not None and len(instances):
        names = dict(enumerate(class_names))
        fields = instances.pred_boxes.tensor, instances.pred_classes, instances.scores
        for box, number, score in zip(*(field.tolist() for field in fields)):
            label = f"{names.get(number, f'class {number}')} {score:.0%}"
            detections.append({"box": box, "label": label})
        start = instances.pred_boxes.get_centers()[0].tolist()
    max_bytes = MAPS_BYTES // len(attention.geometry)
    image = {"name": name, "source": _jpeg(attention.image), "width": width, "height": height}
    data = {
        "image": image,
        "blocks": [_block_data(attention, block, max_bytes) for block in attention.geometry],
        "detections": detections,
        "start": start,  # x and y of the initial query
    }
    page = (ASSETS / "attention_page.html").read_text("utf-8")
    for key, text in {
        "title": html.escape(f"Attention of non-local blocks: {name}"),
        "style": (ASSETS / "attention_page.css").read_text("utf-8"),
        "script": (ASSETS / "attention_page.js").read_text("utf-8"),
        "data": json.dumps(data).replace("<", "\\u003c"),  # last: may contain any placeholder
    }.items():
        page = page.replace(f"{{{{ {key} }}}}", text)
    return page


def _block_data(attention: Attention, name: str, max_bytes: int) -> dict:
    """Return the data of one block.

    Returns:
        ``queries`` and ``targets``: grids, see ``_grid``. ``strongest``: number of exact weights
        per query. ``signed``: whether weights can be negative. ``about``: a description for the
        reader. ``data``: the arrays of ``_pack``, compressed, in base64.
    """
    recorder, geometry = attention.recorder, attention.geometry[name]
    block, map_size = recorder.blocks[name], recorder.map_size(name)
    # The grid of the query positions is computed like that of the targets.
    query_geometry = replace(geometry, target_size=map_size, target_stride=geometry.stride)

    targets = math.prod(map(len, _visible(geometry)))
    count, step = min(STRONGEST, targets), 1
    bytes_per_query = targets + 8 * count + 4
    while math.prod(map(len, _visible(query_geometry, step))) * bytes_per_query > max_bytes:
        step += 1
    positions = torch.cartesian_prod(*_visible(query_geometry, step))
    chunks = [_pack(recorder.rows(name, some), geometry, count) for some in positions.split(CHUNK)]
    arrays = [torch.cat(parts).numpy().tobytes() for parts in zip(*chunks)]

    about = f"{name}: {block.instantiation}, {map_size[0]} x {map_size[1]} query positions"
    if block.subsample != "none":
        rows, columns = geometry.target_size
        about += f", {rows} x {columns} target positions (sub-sampling {block.subsample})"
    if step > 1:
        about += f". To limit the file size, the page has one query of every {step} x {step}"
    return {
        "name": name,
        "about": f"{about}.",
        "signed": block.instantiation == "dot_product",
        "strongest": count,
        "queries": _grid(query_geometry, step),
        "targets": _grid(geometry),
        "data": base64.b64encode(zlib.compress(b"".join(arrays), 9)).decode(),
    }


def _visible(geometry: ImageGeometry, step: int = 1) -> tuple[Tensor, Tensor]:
    """Return the rows and columns that cover a part of the image; the middle one of ``step``."""
    in_image = geometry.in_image()
    counts = int(in_image.any(1).sum()), int(in_image.any(0).sum())
    return tuple((torch.arange(0, n, step) + step // 2).clamp(max=n - 1) for n in counts)


def _grid(geometry: ImageGeometry, step: int = 1) -> dict:
    """Return the centres, ``y`` and ``x``, and the size of a ``cell``, in pixels of the image."""
    rows, columns = _visible(geometry, step)
    (height, width), (resized_height, resized_width) = geometry.image_size, geometry.resized_size
    side = geometry.target_stride * step
    return {
        "y": geometry.target_points(torch.cartesian_prod(rows, columns[:1]))[:, 1].tolist(),
        "x": geometry.target_points(torch.cartesian_prod(rows[:1], columns))[:, 0].tolist(),
        "cell": [side * width / resized_width, side * height / resized_height],
    }


def _pack(rows: Tensor, geometry: ImageGeometry, count: int) -> tuple[Tensor, ...]:
    """Convert weights, (K, Hm, Wm), to the arrays of the page.

    Returns:
        Indices of the ``count`` targets in the image with the largest absolute weights, in
        descending order, (K, count), int32, and their weights, float32. The share of weight in the
        padding, (K), float32. Levels, (K, M), int8: sign(w) * LEVELS * sqrt(|w| / max |w|).
    """
    height, width = map(len, _visible(geometry))
    weights = rows[:, :height, :width].flatten(1)
    order = weights.abs().argsort(dim=1, descending=True, stable=True)[:, :count]
    strongest = weights.gather(1, order)
    largest = strongest[:, :1].abs().clamp(min=torch.finfo(weights.dtype).tiny)
    levels = weights.sign() * (LEVELS * (weights.abs() / largest).sqrt()).round()
    padding = geometry.padding_share(rows)
    return order.int(), strongest.float(), padding.float(), levels.to(torch.int8)


def _jpeg(image: np.ndarray) -> str:
    """Return a BGR image as a data URI."""
    picture = Image.fromarray(image[:, :, ::-1])
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
