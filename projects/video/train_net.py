#!/usr/bin/env python
"""Train or evaluate a video classifier, with the flags of detectron2's train_net.py."""

from nl_video import add_video_config
from nl_video.trainer import VideoTrainer

from nl_detectron.engine import main

# isort: split
# After nl_detectron, which silences a warning of torch that importing detectron2 causes.
from detectron2.engine import default_argument_parser

if __name__ == "__main__":
    main(default_argument_parser().parse_args(), trainer=VideoTrainer, add_config=add_video_config)
