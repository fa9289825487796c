"""How a command fails: in one line, and where nobody foresaw it with its traceback in a file."""

import os
import pathlib
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import arcond_jax
from arcond_jax import build, checkpoint
from arcond_jax.parallel import processes
from arcond_jax.training import loop

REFUSED, UNFORESEEN, INTERRUPTED = 2, 1, 130  # exit codes
LOST = 134  # another process is gone; what jax ends with where it hears of that first (SIGABRT)
STOPPED = 75  # told to stop, and saved: the same command goes on; EX_TEMPFAIL of sysexits.h
PACKAGE = pathlib.Path(arcond_jax.__file__).parent


def guarded(command: str, run: Callable[[], int | None]) -> tuple[int, str | None]:
    """Runs a command; returns its exit code and, if it failed, the line that stderr got."""
    sys.unraisablehook = _unless_late
    try:
        code = run() or 0
        sys.stdout.flush()  # by Python itself it would be after this, and without a line
        return code, None
    except BrokenPipeError:  # as `| head` leaves behind; what ends at a signal ends with its number
        _give_up_output()
        return 128 + signal.SIGPIPE, None
    except KeyboardInterrupt:
        message, code = "interrupted", INTERRUPTED
    except Exception as error:
        message, code = _explained(error), REFUSED
        if lost := processes.lost_another(error):
            message, code = f"another process is gone, start all again ({lost[:200]})", LOST
        if message is None:
            message, code = _unforeseen(command, error), UNFORESEEN
    line = f"arcond {command}: {message}"
    print(line, file=sys.stderr)
    return code, line


def _give_up_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's last flush


def _unless_late(raised: Any) -> None:
    """Prints what could not be raised, but none of reads and writes after the first that failed."""
    if str(raised.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(raised)


def _explained(error: Exception) -> str | None:
    """What to tell of an error of a known cause, in one line; None for any other."""
    text = " ".join(str(error).split())
    if "Unable to initialize backend" in text or _is_of_backends(error):
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = text[:200] or "no device"
        return f"JAX_PLATFORMS={platforms} cannot be used here ({reason}): unset it"
    if isinstance(error, OSError) and _is_of_output(error):
        _give_up_output()
        return f"standard output cannot be written: {error.strerror}; what it has is not whole"
    known = (build.ConfigError, checkpoint.CheckpointError, loop.DivergedError)
    if isinstance(error, (*known, OSError, ImportError)):  # ImportError: of what only some need
        return text
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"out of memory: take a smaller batch or more devices ({text[:200]})"
    if isinstance(error, ValueError) and _is_ours(error):
        return text
    return None


def _is_ours(error: Exception) -> bool:
    """Whether the library raised it on purpose, and not something that the library called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and pathlib.Path(frames[-1].filename).is_relative_to(PACKAGE)


def _is_of_output(error: OSError) -> bool:
    """Whether a `print` raised it: commands write nothing else themselves, and it names no file."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    of_system = error.errno is not None and error.filename is None
    return of_system and pathlib.Path(last).parent == PACKAGE / "cli"


def _is_of_backends(error: Exception) -> bool:
    """Whether jax asserts that it has a device; it says no more where CUDA is not installed."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, AssertionError) and frames[-1].filename.endswith("xla_bridge.py")


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
