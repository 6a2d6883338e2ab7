#!/usr/bin/env python
"""Print the top classes of a video, or draw what a spacetime block attends to in it (Fig. 3)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from nl_video import load_config
from nl_video.attention import draw_attention
from nl_video.clips import ClipMapper
from nl_video.data import register_paths
from nl_video.weights import VideoCheckpointer

from nl_detectron.errors import UserError, exit_on_user_error
from nl_detectron.files import write_atomically
from nl_detectron.modeling import build_model

CONFIG = Path(__file__).parent / "configs/C2D_R50_NL_5_blocks.yaml"


def main(argv: Optional[Sequence[str]] = None) -> None:
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
        cfg = load_config(args.config_file, ["TEST.CLIP.PROTOCOL", "views", *args.opts])
        register_paths(cfg)
        names = range(cfg.MODEL.VIDEO.NUM_CLASSES)
        for dataset in set(cfg.DATASETS.TEST) & set(DatasetCatalog.list()):
            names = MetadataCatalog.get(dataset).get("classes", names)
        if len(names) != cfg.MODEL.VIDEO.NUM_CLASSES:
            raise UserError(f"MODEL.VIDEO.NUM_CLASSES does not fit the {len(names)} class names")
        model = build_model(cfg).eval()
        VideoCheckpointer(model, partial=cfg.MODEL.WEIGHTS_PARTIAL).load(args.weights)
        video = {"file_name": args.video, "label": -1, "video_id": args.video}
        video = ClipMapper(cfg, is_train=False)(video)
        scores = model([video])[0]["scores"].cpu()
        for label in scores.argsort(descending=True)[: args.top].tolist():
            print(f"{scores[label]:6.1%}  {names[label]}")
        if args.figure:
            figure = draw_attention(model, video["clips"][:1], args.block, args.query)
            with write_atomically(args.figure, "wb") as file:
                figure.savefig(file, format=args.figure.suffix[1:], dpi=120)


if __name__ == "__main__":
    main()
