"""Ctrl-C, SIGTERM and SIGHUP end a command at once, in one line, and leave nothing half-written.

Python tells its main thread of a signal only between two of its own steps, so that one which comes
while XLA compiles would wait for minutes; and an exception that is raised there may end in a
callback of XLA, which drops it. A thread of our own ends the process instead. Training keeps its
own handlers while it runs (`training.stopping`), and saves first; the thread only tells it.
"""

import os
import signal
import sys
import threading
from typing import Any

from arcond_jax.training import stopping

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS = 10.0  # for what is half-written to be removed
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


def on_signals() -> None:
    """From here on a signal ends this process with 128 plus its number; for programs alone.

    A signal that is ignored (SIGHUP under nohup) stays so. Of stdin, stdout and stderr, what is
    closed becomes /dev/null, so that its number does not go to another file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # stays open
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    # First the thread: to it a signal leaves this one, which would not start it any more.
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) in DEFAULTS:
            signal.signal(number, _left_to_the_watcher)


def _left_to_the_watcher(number: int, _: Any) -> None:
    """Makes Python write the number of the signal to the pipe; where it runs, nothing goes on."""
    threading.Event().wait()


def _watch(reading: int) -> None:
    while True:
        number = os.read(reading, 1)[0]
        if number in SIGNALS and _ends(signal.Signals(number)):
            _leave(signal.Signals(number))


def _ends(number: signal.Signals) -> bool:
    handler = signal.getsignal(number)
    training = getattr(handler, "__self__", None)
    if isinstance(training, stopping.Stop):
        return training.heard(number)
    return handler is _left_to_the_watcher


def _leave(number: signal.Signals) -> None:
    # Whatever goes wrong.
    threading.Timer(SECONDS, os._exit, [128 + number]).start()
    try:
        # Until it is imported, nothing is being written.
        getattr(sys.modules.get("arcond_jax.atomic"), "abandon", lambda: None)()
        what = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        stopping.say(f"arcond: {what}\n")
    finally:
        os._exit(128 + number)
