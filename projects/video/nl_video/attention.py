"""What a spacetime block attends to, drawn as in Fig. 3 of the paper."""

from collections.abc import Sequence
from typing import Optional

import torch
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from torch import Tensor, nn

from nl_detectron.errors import UserError
from nl_detectron.visualization.attention import affinity_rows, find_blocks
from nl_detectron.visualization.figure import MIN_RELATIVE_WEIGHT, POSITIVE, QUERY


def attention_row(
    model: nn.Module, clip: Tensor, block: str, query: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the weights of one query, and the position of the query.

    Args:
        model: a VideoClassifier.
        clip: (1, 3, T, H, W), RGB.
        block: name of a block, such as "res4.4"; "" for the last one.
        query: frame, x and y in the clip.

    Returns:
        (T', Hm, Wm), the weights of all target positions; the position (t, y, x) of the query.
    """
    blocks = find_blocks(model)
    block = block or list(blocks)[-1]
    if block not in blocks:
        raise UserError(f"no non-local block {block!r}; there are: {', '.join(blocks)}")
    if model.backbone.nonlocal_axes != "spacetime":
        raise UserError("the figure needs a block with MODEL.VIDEO.NONLOCAL_AXES spacetime")
    inputs, module = [], blocks[block]
    with module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])), torch.no_grad():
        model.features(clip)
    size, (frame, x, y) = inputs[0].shape[2:], query
    if not all(0 <= i < n for i, n in zip((frame, y, x), clip.shape[2:])):
        raise UserError(f"the query {tuple(query)} is outside the clip, {tuple(clip.shape[2:])}")
    position = [int(i * n / m) for i, n, m in zip((y, x), size[1:], clip.shape[3:])]
    # Pooling with padding centres position t of T' at frame t * T / T'.
    position = (min(round(frame * size[0] / clip.shape[2]), size[0] - 1), *position)
    flat = torch.tensor([(position[0] * size[1] + position[1]) * size[2] + position[2]])
    row = affinity_rows(module, inputs[0], flat.to(inputs[0].device))[0].cpu()
    targets = size if module.subsample == "none" else (size[0], *(-(-n // 2) for n in size[1:]))
    return row.reshape(targets), position


def draw_attention(
    model: nn.Module,
    clip: Tensor,
    block: str = "",
    query: Optional[Sequence[int]] = None,
    arrows: int = 20,
) -> Figure:
    """Draw a frame for each position in time, and arrows from the query to the strongest targets.

    Args:
        clip, block, query: as for :func:`attention_row`; the default query is the centre.
    """
    frames, height, width = clip.shape[2:]
    query = query or (frames // 2, width // 2, height // 2)
    row, (time, _, _) = attention_row(model, clip, block, query)
    count = len(row)
    figure = Figure(figsize=(2 * count, 2 * height / width + 0.3), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for t, axes in enumerate(panels):
        frame = query[0] if t == time else t * frames // count
        axes.imshow(clip[0, :, frame].permute(1, 2, 0), extent=(0, width, height, 0))
        axes.set_title(f"frame {frame}, weight {row[t].abs().sum():.2f}", fontsize=8)
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    weights, order = row.abs().flatten().sort(descending=True)
    start = (query[1] + 0.5, query[2] + 0.5)
    for weight, index in zip(weights[:arrows].tolist(), order.tolist()):
        share = weight / (weights[0].item() or 1.0)
        if share < MIN_RELATIVE_WEIGHT:
            break
        t, y, x = torch.unravel_index(torch.tensor(index), row.shape)
        end = ((x.item() + 0.5) * width / row.shape[2], (y.item() + 0.5) * height / row.shape[1])
        arrow = ConnectionPatch(
            start, end, "data", "data", axesA=panels[time], axesB=panels[t],
            arrowstyle="-|>", color=POSITIVE, linewidth=0.4 + 1.6 * share, alpha=0.2 + 0.8 * share,
        )  # fmt: skip
        figure.add_artist(arrow)
    panels[time].plot(*start, "o", color=QUERY, markeredgecolor="white", markersize=6, zorder=6)
    return figure
