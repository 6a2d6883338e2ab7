#!/usr/bin/env python
"""Train or evaluate a video classifier, with the flags of detectron2's train_net.py."""

from nl_video import add_video_config
from nl_video.trainer import VideoTrainer, default_argument_parser

from nl_detectron.engine import main

if __name__ == "__main__":
    main(default_argument_parser().parse_args(), trainer=VideoTrainer, add_config=add_video_config)
