#!/usr/bin/env python
"""Print the top classes of a video, or draw what a spacetime block attends to in it (Fig. 3)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from nl_video import VideoClassifier, load_config
from nl_video.clips import ClipMapper
from nl_video.data import class_names
from nl_video.trainer import VideoTrainer
from torch import Tensor

from nl_detectron.errors import UserError, exit_on_user_error
from nl_detectron.files import write_atomically
from nl_detectron.visualization.attention import AttentionRecorder, find_blocks

CONFIG = Path(__file__).parent / "configs/C2D_R50_NL_5_blocks.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", metavar="FILE", help="mp4, avi, webm, mkv, ...")
    parser.add_argument("--weights", required=True, metavar="PTH", help="a trained model")
    parser.add_argument("--config-file", default=str(CONFIG), metavar="YAML")
    parser.add_argument("--top", type=int, default=5, help="number of classes (default: 5)")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the attention")
    figure_help = "frame and pixel of the first view, for the figure (default: its centre)"
    parser.add_argument("--query", type=int, nargs=3, metavar=("FRAME", "X", "Y"), help=figure_help)
    parser.add_argument("--block", default="", help='such as "res4.4" (default: the last)')
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    args = parser.parse_args(argv)
    with exit_on_user_error(), torch.no_grad():
        cfg = load_config(args.config_file, [*args.opts, "TEST.CLIP.PROTOCOL", "views"])
        names = class_names(cfg, cfg.DATASETS.TEST[0]) or range(cfg.MODEL.VIDEO.NUM_CLASSES)
        model = VideoTrainer.build_model(cfg).eval()
        VideoTrainer.build_checkpointer(cfg, model).load(args.weights)
        clips = ClipMapper(cfg, is_train=False)({"file_name": args.video})["clips"]
        scores = model([{"clips": clips}])[0]["scores"].cpu()
        for label in scores.argsort(descending=True)[: args.top].tolist():
            print(f"{scores[label]:6.1%}  {names[label]}")
        if args.figure:
            figure = draw_attention(model, clips[:1], args.block, args.query)
            with write_atomically(args.figure, "wb") as file:
                figure.savefig(file, format="png", dpi=120)


def draw_attention(
    model: VideoClassifier, clip: Tensor, block: str, query: Sequence[int] | None
) -> Figure:
    """Draw a frame for each position in time, and arrows from the query to the 20 strongest.

    ``clip`` is (1, 3, T, H, W), RGB; ``query`` is frame, x and y in it, by default its centre.
    ``block`` is a name such as "res4.4", or "" for the last block.
    """
    frames, height, width = clip.shape[2:]
    frame, x, y = query or (frames // 2, width // 2, height // 2)
    if not (0 <= frame < frames and 0 <= y < height and 0 <= x < width):
        raise UserError(f"--query is {query}; frames, width, height: {frames}, {width}, {height}")
    if model.backbone.nonlocal_axes != "spacetime":
        raise UserError("--figure needs a block with MODEL.VIDEO.NONLOCAL_AXES spacetime")
    block = block or list(find_blocks(model))[-1]
    with AttentionRecorder(model, [block]) as recorder:
        model.features(clip)
    features, module = recorder.inputs[block], recorder.blocks[block]
    times, rows, columns = features.shape[2:]
    # Pooling with padding centres position t of the T' in time at frame t * T / T'.
    time = min(round(frame * times / frames), times - 1)
    position = (time * rows + y * rows // height) * columns + x * columns // width
    weights = module.affinity_matrix(features, torch.tensor([position]))[0, 0].abs().cpu()
    if module.subsample != "none":
        rows, columns = -(-rows // 2), -(-columns // 2)
    weights = weights.reshape(times, rows, columns)
    figure = Figure(figsize=(2 * times, 2 * height / width + 0.3), layout="constrained")
    panels = figure.subplots(1, times, squeeze=False)[0]
    for t, axes in enumerate(panels):
        shown = frame if t == time else t * frames // times
        axes.imshow(clip[0, :, shown].permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
        axes.set_title(f"frame {shown}, weight {weights[t].sum():.2f}", fontsize=8)
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    start = (x + 0.5, y + 0.5)
    strongest, indices = weights.flatten().topk(min(20, weights.numel()))
    shares = (strongest / strongest[0]).tolist()
    for share, t, row, column in zip(shares, *np.unravel_index(indices.numpy(), weights.shape)):
        end = ((column + 0.5) * width / columns, (row + 0.5) * height / rows)
        style = {"arrowstyle": "-|>", "color": "#ffb000", "linewidth": 2 * share, "alpha": share}
        ends = {"axesA": panels[time], "axesB": panels[t]}
        figure.add_artist(ConnectionPatch(start, end, "data", **ends, **style))
    panels[time].plot(*start, "o", color="#e6004c", markeredgecolor="white", zorder=6)
    return figure


if __name__ == "__main__":
    main()
