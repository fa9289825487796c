"""Being told to stop: the signal is kept until what is under way is whole."""

import signal
import threading
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a scheduler, Ctrl-C, a closed terminal


class Stop:
    """Turns SIGTERM, SIGINT and SIGHUP into a flag while it is entered, however often they come.

    A signal that the process ignores (SIGHUP under nohup) stays ignored. Python hands signals to
    its main thread alone, so in another thread nothing is held.

    Attributes:
      signal: Name of the first signal that came; None before.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
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
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        self.signal = self.signal or signal.Signals(number).name
