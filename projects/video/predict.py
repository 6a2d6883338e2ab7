#!/usr/bin/env python
"""Print the top classes of a video, or draw what a non-local block attends to in it (Fig. 3).

The classes are those of DATASETS.TEST, or the lines of a file.
"""

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


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", metavar="FILE", help="mp4, avi, webm, mkv, ...")
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--classes", type=Path, metavar="TXT", help="one name per line")
    parser.add_argument("--top", type=int, default=5, help="number of classes (default: 5)")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the attention of a block")
    parser.add_argument(
        "--query", type=int, nargs=3, metavar=("FRAME", "X", "Y"),
        help="frame of the clip and pixel of the crop where the arrows start (default: centre)",
    )  # fmt: skip
    parser.add_argument("--block", default="", help='name, such as "res4.4" (default: the last)')
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE, such as MODEL.WEIGHTS")
    args = parser.parse_args(argv)
    with exit_on_user_error(), torch.no_grad():
        cfg = load_config(args.config_file, args.opts)
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty; give the weights of a trained model")
        names = _class_names(cfg, args.classes)
        model = build_model(cfg).eval()
        VideoCheckpointer(model, partial=cfg.MODEL.WEIGHTS_PARTIAL).load(cfg.MODEL.WEIGHTS)
        video = {"file_name": args.video, "label": -1, "video_id": args.video}
        video = ClipMapper(cfg, is_train=False)(video)
        scores = model([video])[0]["scores"].cpu()
        for score, label in zip(*(column.tolist() for column in scores.sort(descending=True))):
            print(f"{score:6.1%}  {names[label]}")
            args.top -= 1
            if args.top < 1:
                break
        if args.figure:
            figure = draw_attention(model, video["clips"][:1], args.block, args.query)
            with write_atomically(args.figure, "wb") as file:
                figure.savefig(file, format=args.figure.suffix[1:], dpi=120)


def _class_names(cfg, path: Optional[Path]) -> Sequence[str]:
    count = cfg.MODEL.VIDEO.NUM_CLASSES
    register_paths(cfg)
    if path is not None and not path.is_file():
        raise UserError(f"--classes: there is no file {path}")
    names = path.read_text().splitlines() if path else None
    for name in set(cfg.DATASETS.TEST) & set(DatasetCatalog.list()) if names is None else ():
        names = MetadataCatalog.get(name).get("classes")
    if names and len(names) != count:
        raise UserError(f"{len(names)} class names for MODEL.VIDEO.NUM_CLASSES {count}")
    return names or [f"class {label}" for label in range(count)]


if __name__ == "__main__":
    main()
