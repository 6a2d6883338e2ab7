"""Stop a training on SIGTERM (pre-emption) or SIGINT (Ctrl-C), after writing a checkpoint."""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import Process
from subprocess import Popen
from types import FrameType

from detectron2.engine import HookBase
from detectron2.utils import comm

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(HookBase):
    """Hook that finishes the step, writes a checkpoint and exits on SIGTERM or SIGINT.

    The exit status is 128 + the signal's number, as in a shell. A second SIGINT ends the process at
    once. An evaluation in progress is finished first. If one process of a distributed run gets the
    signal, all of them stop after the same step.
    """

    _signal = 0  # number of the signal that has arrived

    def before_train(self) -> None:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if comm.is_main_process():  # os.write, because the signal may have interrupted a print
            os.write(2, b"stopping after this step; Ctrl-C to stop at once\n")

    def after_step(self) -> None:
        number = max(comm.all_gather(self._signal))
        if not number:
            return
        iteration = self.trainer.iter
        if iteration + 1 < self.trainer.max_iter:  # otherwise model_final.pth is written already
            self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        comm.synchronize()  # launchers kill all processes as soon as one has exited
        if comm.is_main_process():
            stopped = f"stopped by {signal.Signals(number).name} after iteration {iteration}"
            print(f"{stopped}; to continue, add --resume", file=sys.stderr)
        sys.exit(128 + number)

    def after_train(self) -> None:
        if not self._signal:
            for number, handler in self._previous.items():
                signal.signal(number, handler)


@contextmanager
def forward_signals(children: Callable[[], Iterable[Popen | Process]]) -> Iterator[None]:
    """Pass SIGTERM on to ``children()`` while the body waits for them; Ctrl-C reaches them anyway.

    After either signal, exit with status 128 + its number when the body ends.
    """
    received = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGTERM:
            for child in children():
                child.terminate()

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:  # also if launch() has raised the exit status of a child
            sys.exit(128 + received[0])
