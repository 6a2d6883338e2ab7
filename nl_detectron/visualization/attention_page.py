"""An interactive HTML page, one file: the attention of the position under the pointer."""

import base64
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import torch
from detectron2.structures import Instances

from .attention import Attention

ASSETS = Path(__file__).parent / "assets"
MAPS_BYTES = 6_000_000  # of all blocks, before compression; at most 8 MB in base64
LEVELS = 127  # quantisation steps of a weight, on either side of zero
IMAGE_SIDE = 1344  # pixels; a larger image is shrunk


def attention_page(
    attention: Attention, name: str, instances: Instances | None = None, classes: Sequence[str] = ()
) -> str:
    """Return the page of the image ``name``, smaller than 10 MB.

    If the maps of all queries would be too large, the page has every n-th row and column. It can
    show ``instances``, with names from ``classes``, and starts with the first one as the query.
    """
    height, width = attention.image.shape[:2]
    scale = min(1.0, IMAGE_SIDE / max(height, width))
    small = cv2.resize(attention.image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    source = base64.b64encode(cv2.imencode(".jpg", small)[1]).decode()
    detections, names = [], dict(enumerate(classes))
    if instances is not None:
        fields = instances.pred_boxes.tensor, instances.pred_classes, instances.scores
        for box, number, score in zip(*(field.tolist() for field in fields)):
            label = f"{names.get(number, f'class {number}')} {score:.0%}"
            detections.append({"box": box, "label": label})
    max_bytes = MAPS_BYTES // len(attention.geometry)
    data = {
        "image": {"name": name, "jpeg": source, "width": width, "height": height},
        "blocks": [_block_data(attention, block, max_bytes) for block in attention.geometry],
        "detections": detections,
    }
    page = (ASSETS / "attention_page.html").read_text("utf-8")
    for kind in ("css", "js"):
        asset = (ASSETS / f"attention_page.{kind}").read_text("utf-8")
        page = page.replace(f"{{{{ {kind} }}}}", asset)
    return page.replace("{{ data }}", json.dumps(data).replace("<", "\\u003c"))


def _block_data(attention: Attention, name: str, max_bytes: int) -> dict:
    """Return the data of one block.

    ``queries`` are rows and columns of query positions, one of ``step`` x ``step``; ``targets`` are
    the numbers of target rows and columns; ``cells`` are width and height of a query and a target,
    in pixels of the image; ``maps`` are compressed arrays: the largest absolute weight (Q,) and the
    share of weight in padding (Q,), float32; sign(w) * LEVELS * sqrt(|w| / largest) (Q, M), int8.
    """
    recorder, geometry = attention.recorder, attention.geometry[name]
    counts = geometry.visible(geometry.stride)
    rows, columns = geometry.visible(geometry.target_stride)
    step = math.ceil(math.sqrt(math.prod(counts) * (rows * columns + 8) / max_bytes))
    # The position in the middle stands for step x step positions.
    queries = [(torch.arange(0, n, step) + step // 2).clamp(max=n - 1) for n in counts]
    all_weights = recorder.rows(name, torch.cartesian_prod(*queries))
    weights = all_weights[:, :rows, :columns].flatten(1)
    largest = weights.abs().amax(dim=1, keepdim=True)
    relative = weights.abs() / largest.clamp(min=torch.finfo(weights.dtype).tiny)
    levels = (weights.sign() * LEVELS * relative.sqrt()).round()
    arrays = largest.float(), geometry.padding_share(all_weights).float(), levels.to(torch.int8)
    maps = b"".join(array.numpy().tobytes() for array in arrays)
    return {
        "name": name,
        "instantiation": recorder.blocks[name].instantiation,
        "step": step,
        "queries": [indices.tolist() for indices in queries],
        "targets": [rows, columns],
        "cells": [geometry.cell_size(s) for s in (geometry.stride, geometry.target_stride)],
        "maps": base64.b64encode(zlib.compress(maps, 9)).decode(),
    }
