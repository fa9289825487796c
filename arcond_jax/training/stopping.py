"""Being told to stop: the signal is kept until what is under way is whole."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from arcond_jax.parallel import processes

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a scheduler, Ctrl-C, a closed terminal


class Stop:
    """Turns SIGTERM, SIGINT and SIGHUP into a flag while it is entered, however often they come.

    A signal that the process ignores (SIGHUP under nohup) stays ignored. Python hands signals to
    its main thread alone, so in another thread nothing is held. Of several processes none heeds a
    signal afterwards: one that ended before the others would have them fail.

    Attributes:
      signal: Name of the first signal that came; None before.
      unsaved: Whether there are steps that only a save keeps.
      is_writing: Whether a save is under way.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.unsaved = False
        self.is_writing: Callable[[], bool] = lambda: False
        self._heard = 0
        self._over = False
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        if processes.are_several():  # all is saved, and they wait for each other to end
            self._over = True
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def heard(self, number: signal.Signals) -> bool:
        """Says in a line that the first signal came; for a thread that hears of each at once.

        The main thread may be in XLA for minutes, and Python calls `_receive` when it is back.

        Returns:
          Whether to end the process: a later SIGINT, where nothing would be lost. Waits until what
          is being written is whole.
        """
        if self._over:
            return False
        self._heard += 1
        if self._heard == 1:
            again = "" if self.unsaved else "; Ctrl-C ends it at once"
            line = f"arcond: {number.name}: will stop after this step and save it{again}\n"
            say(line)
        if self._heard == 1 or number != signal.SIGINT or self.unsaved:
            return False
        while self.is_writing():
            time.sleep(0.05)
        return not self.unsaved

    def _receive(self, number: int, _: Any) -> None:
        self.signal = self.signal or signal.Signals(number).name


def say(line: str) -> None:
    """Writes to stderr, if that takes it at once; the main thread may be inside of print."""
    with contextlib.suppress(OSError):  # it is closed
        if select.select([], [2], [], 0)[1]:
            os.write(2, line.encode())
