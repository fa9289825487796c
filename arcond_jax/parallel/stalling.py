"""A process that hangs shows where, and ends.

Of a process that is gone jax tells the others. One that is there and goes nowhere, in a read that
never returns or on a device that does not answer, holds all of them for ever, and its heart beats.
"""

import contextlib
import faulthandler
import math
import os
import threading
import time
from collections.abc import Iterator

EXIT_CODE = 124  # that of `timeout`
# What compiles takes longer than what is compiled: so many times as long is waited for it, and no
# less than so many seconds.
LONGER, LONGER_AT_LEAST = 4, 3600.0
TOGETHER = 10.0  # seconds between the stacks and the end, in which other processes show theirs

_lock = threading.Lock()
_deadline = math.inf  # of `time.monotonic`
_seconds: float | None = None
_in_longer = 0


@contextlib.contextmanager
def watched(minutes: float | None) -> Iterator[None]:
    """Ends this process when no piece of work ended for so long, until the block ends.

    All stacks go to stderr, and the exit code is `EXIT_CODE`. Until the first `ended`, and within
    `longer`, it is `LONGER` times as long, an hour at least: programs are compiled then.

    Args:
      minutes: Above 0; None watches nothing.
    """
    global _seconds, _deadline
    if minutes is None:
        yield
        return
    with _lock:
        _seconds, _deadline = 60 * minutes, time.monotonic() + _longer(60 * minutes)
    over = threading.Event()
    threading.Thread(target=_watch, args=(over,), name="stalling", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        with _lock:
            _seconds, _deadline = None, math.inf


def ended() -> None:
    """A piece of work has: a step, a batch."""
    global _deadline
    with _lock:
        if _seconds is not None:
            wait = _longer(_seconds) if _in_longer else _seconds
            _deadline = time.monotonic() + wait


@contextlib.contextmanager
def longer() -> Iterator[None]:
    """For work that may compile something, or is rare and long: its pieces may take longer."""
    global _in_longer
    with _lock:
        _in_longer += 1
    ended()
    try:
        yield
    finally:
        with _lock:
            _in_longer -= 1
        ended()


def _longer(seconds: float) -> float:
    return max(LONGER * seconds, LONGER_AT_LEAST)


def _watch(over: threading.Event) -> None:
    while True:
        with _lock:
            left, seconds = _deadline - time.monotonic(), _seconds
        if left <= 0 and seconds is not None:
            break
        if over.wait(min(max(left, 0.01), 1.0)):
            return
    line = (
        f"arcond: nothing ended for {seconds / 60:g} minutes (--stall_minutes): ending with exit "
        f"code {EXIT_CODE}; where each thread is:\n"
    )
    with contextlib.suppress(OSError):  # stderr is closed
        os.write(2, line.encode())
        faulthandler.dump_traceback(2, all_threads=True)
    time.sleep(TOGETHER)
    os._exit(EXIT_CODE)
