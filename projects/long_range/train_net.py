#!/usr/bin/env python
"""Train or evaluate one row of the study, with the flags of nl_detectron's train_net.py."""

import long_range  # noqa: F401 - registers the backbones and the datasets

from nl_detectron.engine import argument_parser, main

if __name__ == "__main__":
    main(argument_parser().parse_args())
