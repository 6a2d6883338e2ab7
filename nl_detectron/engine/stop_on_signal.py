"""Pre-emption and Ctrl-C: a checkpoint first, then the end."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import Process
from subprocess import Popen
from types import FrameType
from typing import Optional, Union

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(HookBase):
    """On SIGTERM or SIGINT, finishes the step, writes a checkpoint and ends the process.

    The exit status is 128 + the signal's number, as in a shell: 143 or 130. A second SIGINT ends
    the process at once. An evaluation in progress is finished first, and one step after it.

    The processes of a distributed run agree after every step, with one number from each, and stop
    after the same one; so it is enough that one of them gets the signal.
    """

    def __init__(self):
        self._signal = 0
        self._previous = {}

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():  # others must not set handlers
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        self._signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if comm.is_main_process():  # os.write, since print may be what the signal interrupted
            name = signal.Signals(number).name
            os.write(2, f"{name}: stopping after this step; Ctrl-C to stop at once\n".encode())

    def after_step(self) -> None:
        number = max(comm.all_gather(self._signal))
        if not number:
            return
        iteration = self.trainer.iter
        if iteration + 1 < self.trainer.max_iter:  # otherwise model_final.pth is written already
            self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        comm.synchronize()  # launchers end all processes as soon as one has ended
        if comm.is_main_process():
            print(
                f"stopped by {signal.Signals(number).name} after iteration {iteration}; "
                "the same command with --resume goes on from there",
                file=sys.stderr,
            )
        sys.exit(128 + number)

    def after_train(self) -> None:
        if not self._signal:
            for number, handler in self._previous.items():
                signal.signal(number, handler)


@contextmanager
def forward_signals(children: Callable[[], Iterable[Union[Popen, Process]]]) -> Iterator[None]:
    """In the body, which waits for processes, leave signals to these; exit when they have ended.

    SIGTERM is passed on to them; Ctrl-C in a terminal reaches them by itself. The exit status is
    128 + the signal's number, as theirs.

    Args:
        children: the processes that there are at the moment.
    """
    noted = []

    def pass_on(number: int, frame: Optional[FrameType]) -> None:
        noted.append(number)
        if number == signal.SIGTERM:
            for child in children():
                child.terminate()

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    except ProcessExitedException:
        if not noted:
            raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if noted:
        sys.exit(128 + noted[0])
