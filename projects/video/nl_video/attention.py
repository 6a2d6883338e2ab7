"""What a spacetime block attends to, drawn as in Fig. 3 of the paper."""

from collections.abc import Sequence
from typing import Optional

import torch
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from torch import Tensor, nn

from nl_detectron.errors import UserError
from nl_detectron.visualization.attention import find_blocks
from nl_detectron.visualization.figure import MIN_RELATIVE_WEIGHT, POSITIVE, QUERY


def attention_row(
    model: nn.Module, clip: Tensor, block: str, query: Sequence[int]
) -> tuple[Tensor, int]:
    """Return the weights (T', Hm, Wm) of one query, and the position of the query in time.

    Args:
        model: a VideoClassifier.
        clip: (1, 3, T, H, W), RGB.
        block: name of a block, such as "res4.4"; "" for the last one.
        query: frame, x and y in the clip.

    Raises:
        UserError: there is no such spacetime block, or the query is outside the clip.
    """
    blocks = find_blocks(model)
    block = block or list(blocks)[-1]
    if block not in blocks:
        raise UserError(f"no non-local block {block!r}; there are: {', '.join(blocks)}")
    if model.backbone.nonlocal_axes != "spacetime":
        raise UserError("the figure needs a block with MODEL.VIDEO.NONLOCAL_AXES spacetime")
    frame, x, y = query
    if not all(0 <= place < n for place, n in zip((frame, y, x), clip.shape[2:])):
        raise UserError(f"the query {tuple(query)} is outside the clip, {tuple(clip.shape[2:])}")
    inputs, module = [], blocks[block]
    with module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])), torch.no_grad():
        model.features(clip)
    times, height, width = inputs[0].shape[2:]
    # Pooling with padding centres position t of the T' in time at frame t * T / T'.
    t = min(round(frame * times / clip.shape[2]), times - 1)
    index = (t * height + y * height // clip.shape[3]) * width + x * width // clip.shape[4]
    with torch.no_grad():
        row = module.affinity_matrix(inputs[0])[0, index].cpu()
    ratio = 1 if module.subsample == "none" else 2
    return row.reshape(times, -(-height // ratio), -(-width // ratio)), t


def draw_attention(
    model: nn.Module,
    clip: Tensor,
    block: str = "",
    query: Optional[Sequence[int]] = None,
    arrows: int = 20,
) -> Figure:
    """Draw a frame for each position in time, and arrows from the query to the strongest targets.

    The arguments are those of :func:`attention_row`; the default query is the centre of the clip.
    """
    frames, height, width = clip.shape[2:]
    query = query or (frames // 2, width // 2, height // 2)
    row, time = attention_row(model, clip, block, query)
    count, rows, columns = row.shape
    figure = Figure(figsize=(2 * count, 2 * height / width + 0.3), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for t, axes in enumerate(panels):
        frame = query[0] if t == time else t * frames // count
        axes.imshow(clip[0, :, frame].permute(1, 2, 0), extent=(0, width, height, 0))
        axes.set_title(f"frame {frame}, weight {row[t].abs().sum():.2f}", fontsize=8)
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    start = (query[1] + 0.5, query[2] + 0.5)
    weights, order = row.abs().flatten().sort(descending=True)
    shares = (weights / weights[0].clamp(min=torch.finfo(row.dtype).tiny)).tolist()
    for share, index in zip(shares[:arrows], order.tolist()):
        t, y, x = index // (rows * columns), index // columns % rows, index % columns
        if share > MIN_RELATIVE_WEIGHT:
            figure.add_artist(
                ConnectionPatch(
                    start,
                    ((x + 0.5) * width / columns, (y + 0.5) * height / rows),
                    "data",
                    axesA=panels[time],
                    axesB=panels[t],
                    arrowstyle="-|>",
                    color=POSITIVE,
                    linewidth=0.4 + 1.6 * share,
                    alpha=0.2 + 0.8 * share,
                )
            )
    panels[time].plot(*start, "o", color=QUERY, markeredgecolor="white", markersize=6, zorder=6)
    return figure
