"""``python -m nl_detectron.run SCRIPT [ARGS...]``: any script, with this package in detectron2.

The script is run as Python runs it. What it gets from detectron2 knows this package: ``get_cfg()``
has its keys, ``build_model()`` and ``build_optimizer()`` obey them. That holds for the processes
that the script spawns, too.
"""

import argparse
import builtins
import os
import runpy
import sys
import types
from collections.abc import Callable

import detectron2.modeling
import detectron2.solver
from detectron2.config import defaults

from .config import add_nonlocal_config
from .modeling import build_model, build_optimizer

SCRIPT = "NL_DETECTRON_SCRIPT"  # the environment variable that tells spawned processes the script


def register() -> None:
    """Add the keys to detectron2's defaults, and put what reads them in the place of its own.

    Importing this package has registered all the rest.
    """
    add_nonlocal_config(defaults._C)
    _replace(detectron2.modeling.build_model, build_model)
    _replace(detectron2.solver.build_optimizer, build_optimizer)


def _replace(function: Callable, by: Callable) -> None:
    """In every module of detectron2 that has imported it under its name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("detectron2.") and vars(module).get(function.__name__) is function:
            setattr(module, function.__name__, by)


def main() -> None:
    """Run the script of the command line as ``__main__``."""
    parser = argparse.ArgumentParser(
        prog="python -m nl_detectron.run",
        description="Run a script with nl_detectron's backbone, heads, data and config keys "
        "registered in detectron2.",
    )
    parser.add_argument("script", help="such as detectron2's tools/train_net.py")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the script's own")
    script = parser.parse_args().script
    path = os.path.join(os.getcwd(), script)
    if not os.path.isfile(path):
        parser.exit(2, f"error: no file {path}\n")

    register()
    os.environ[SCRIPT] = path
    sys.argv = sys.argv[sys.argv.index(script) :]
    sys.path[0] = os.path.dirname(os.path.realpath(path))

    module = types.ModuleType("__main__")
    # Not the script's own, which is None. By this one a spawned process imports nl_detectron.run,
    # which then imports the script; it would be sent to the bare script otherwise.
    module.__spec__ = __spec__
    module.__file__, module.__builtins__ = path, builtins
    sys.modules["__main__"] = module
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, vars(module))


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # in a process that the script has spawned
    register()
    globals().update(runpy.run_path(os.environ[SCRIPT], run_name=__name__), __spec__=__spec__)
