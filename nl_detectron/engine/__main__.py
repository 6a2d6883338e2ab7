"""``python -m nl_detectron.engine`` is ``train_net.py``, from any folder."""

from . import argument_parser, main

if __name__ == "__main__":
    main(argument_parser().parse_args())
