#!/usr/bin/env python
"""Train or evaluate a detectron2 model with or without non-local blocks; see --help."""

from nl_detectron.engine import argument_parser, main

if __name__ == "__main__":
    main(argument_parser().parse_args())
