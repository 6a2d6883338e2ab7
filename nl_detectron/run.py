"""``python -m nl_detectron.run SCRIPT [ARGS...]``: run a detectron2 script with non-local blocks.

The script needs no change. detectron2's ``get_cfg()`` has the keys of this package, and its
``build_model()`` and ``build_optimizer()`` read them, also in processes that the script spawns.
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

SCRIPT = "NL_DETECTRON_SCRIPT"  # environment variable: the script, for processes it spawns


def register() -> None:
    """Add our keys to detectron2's default config, and replace the functions that read them."""
    add_nonlocal_config(defaults._C)
    _replace(detectron2.modeling.build_model, build_model)
    _replace(detectron2.solver.build_optimizer, build_optimizer)


def _replace(function: Callable, replacement: Callable) -> None:
    """Replace a function in every module of detectron2 that has imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("detectron2.") and vars(module).get(function.__name__) is function:
            setattr(module, function.__name__, replacement)


def main() -> None:
    """Run the script named on the command line as ``__main__``."""
    parser = argparse.ArgumentParser(prog="python -m nl_detectron.run", description=__doc__)
    parser.add_argument("script", help="such as detectron2's tools/train_net.py")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments of the script")
    path = os.path.join(os.getcwd(), parser.parse_args().script)
    if not os.path.isfile(path):
        parser.exit(2, f"error: no file {path}\n")

    register()
    os.environ[SCRIPT] = path
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    module = types.ModuleType("__main__")
    # The __spec__ of a script is None. With that of this module, a process that the script spawns
    # imports nl_detectron.run, which runs the script under the name __mp_main__.
    module.__spec__ = __spec__
    module.__file__, module.__builtins__ = path, builtins
    sys.modules["__main__"] = module
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, vars(module))


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # in a process that the script spawned
    register()
    globals().update(runpy.run_path(os.environ[SCRIPT], run_name=__name__), __spec__=__spec__)
