#!/usr/bin/env python3
"""Export a model, or its backbone, and check the file against the model.

The file is loaded again and run on random images of every size given. Printed is the largest
difference of each output, relative to its largest value.

Exit status: 0 if all differences are at most 1e-4; 1 if not; 2 if something given is wrong, or if
the installed torch or detectron2 cannot do this export.
"""

import argparse
import sys
from pathlib import Path

import torch

from nl_detectron.checkpoint import AuditedCheckpointer, LoadError
from nl_detectron.engine import Trainer, exit_on_user_error, load_config
from nl_detectron.engine.setup import find_config_file
from nl_detectron.errors import as_user_error
from nl_detectron.export import (
    FORMATS,
    ExportError,
    check_size,
    export_backbone,
    export_detector,
    flatten,
    load,
    relative_error,
    tracing_adapter,
)

TOLERANCE = 1e-4


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="as of train_net.py")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument(
        "--part",
        choices=["backbone", "model"],
        default="backbone",
        help="a whole model goes to torchscript-trace only; default: backbone",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="to write")
    parser.add_argument(
        "--sizes",
        type=sizes,
        default=[(256, 320), (192, 416)],
        metavar="HxW,HxW,...",
        help="of images: the first is exported, all are checked; default: 256x320,192x416",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, such as MODEL.WEIGHTS FILE"
    )
    args = parser.parse_args()
    if args.part == "model" and args.format != "torchscript-trace":
        parser.error(
            f"--part model --format {args.format}: detectron2 exports whole models by tracing, "
            "--format torchscript-trace"
        )
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.parent}")
    return args


def sizes(text: str) -> list[tuple[int, int]]:
    """ "64x96,81x113" -> [(64, 96), (81, 113)]."""
    found = [tuple(map(int, size.split("x"))) for size in text.split(",")]
    if not all(len(size) == 2 and min(size) > 0 for size in found):
        raise ValueError(text)
    return found


def main() -> int:
    """Export and check, and return the exit status."""
    args = parse_args()
    with exit_on_user_error(), as_user_error(LoadError), as_user_error(ExportError):
        cfg = load_config(find_config_file(args.config_file), args.opts)
        model = Trainer.build_model(cfg).eval()
        if not cfg.MODEL.WEIGHTS:
            print("note: MODEL.WEIGHTS is empty, so random weights are exported", file=sys.stderr)
        with as_user_error(OSError), as_user_error(AssertionError, "Checkpoint"):  # no such file
            checkpointer = AuditedCheckpointer(model, partial=cfg.MODEL.WEIGHTS_PARTIAL)
            checkpointer.load(cfg.MODEL.WEIGHTS)
        torch.manual_seed(0)
        if args.part == "model":
            images = [torch.rand(3, *size) * 255 for size in args.sizes]
            eager = tracing_adapter(model, images[0])
            export_detector(model, images[0], str(args.output))
        else:
            eager = model.backbone
            for size in args.sizes:
                check_size(eager, args.format, *size)
            images = [torch.randn(2, 3, *size) for size in args.sizes]
            images = [image.to(model.device) for image in images]
            export_backbone(eager, images[0], args.format, str(args.output))

    exported = load(args.format, str(args.output))
    worst = 0.0
    with torch.no_grad():
        for image in images:
            expected, outputs = flatten(eager(image)), exported(image)
            error = relative_error(outputs, expected)
            worst = max(worst, error)
            shapes = ", ".join("x".join(map(str, output.shape)) for output in outputs)
            print(f"{'x'.join(map(str, image.shape))}: relative error {error:.1e}; {shapes}")
    verdict = "as the model" if worst <= TOLERANCE else f"NOT as the model, beyond {TOLERANCE}"
    print(f"{args.output}: {args.format}, {verdict}, torch {torch.__version__}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
