"""How a command fails: in one line, and where nobody foresaw it with its traceback in a file."""

import contextlib
import os
import pathlib
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import arcond_jax
from arcond_jax import build, checkpoint
from arcond_jax.training import loop

REFUSED, UNFORESEEN, INTERRUPTED = 2, 1, 130  # exit codes
PACKAGE = pathlib.Path(arcond_jax.__file__).parent


def guarded(command: str, run: Callable[[], None]) -> int:
    """Runs a command; returns its exit code, after a line on stderr if it failed.

    SIGTERM and SIGHUP end it as an exception does, so that nothing half-written stays.
    """
    sys.excepthook = _unless_late
    try:
        with _leaving_on_signals():
            run()
        return 0
    except KeyboardInterrupt:
        message, code = "interrupted", INTERRUPTED
    except Exception as error:
        message, code = _explained(error), REFUSED
        if message is None:
            message, code = _unforeseen(command, error), UNFORESEEN
    print(f"arcond {command}: {message}", file=sys.stderr)
    return code


def _unless_late(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints a traceback, but none of reads that end after the first one failed."""
    if kind is not RuntimeError or str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _explained(error: Exception) -> str | None:
    """What to tell of an error of a known cause, in one line; None for any other."""
    text = " ".join(str(error).split())
    if "Unable to initialize backend" in text:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return f"JAX_PLATFORMS={platforms} cannot be used here ({text[:200]}): unset it"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"out of memory: take a smaller batch or more devices ({text[:200]})"
    known = (build.ConfigError, checkpoint.CheckpointError, loop.DivergedError)
    if isinstance(error, (*known, OSError, ImportError)):  # ImportError: of what only some need
        return text
    if isinstance(error, ValueError) and _is_ours(error):
        return text
    return None


def _is_ours(error: Exception) -> bool:
    """Whether the library raised it on purpose, and not something that the library called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and pathlib.Path(frames[-1].filename).is_relative_to(PACKAGE)


def _unforeseen(command: str, error: Exception) -> str:
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"arcond_{command}_", suffix=".log", delete=False
    ) as log:
        traceback.print_exception(error, file=log)
    first = (str(error).splitlines() or [""])[0][:200]
    return (
        f"unforeseen {type(error).__name__}: {first}; the traceback is in {log.name}: please "
        "report it"
    )


@contextlib.contextmanager
def _leaving_on_signals() -> Iterator[None]:
    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # else ignored, or somebody's own
                previous[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
