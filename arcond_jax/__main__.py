"""`arcond`, and `python -m arcond_jax`, which like it imports nothing from the current folder."""

import os
import signal
import sys


def run() -> int:
    """Runs the command of this process; returns the exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of what is imported next
    from arcond_jax.cli import leaving

    leaving.on_signals()
    from arcond_jax.cli import main

    return main.main(sys.argv[1:])


def _leave_current_folder() -> None:
    """`-m` puts it first, where anybody's numpy.py may lie; a checkout stays there, as the last."""
    if sys.flags.safe_path:
        return
    current, package = sys.path.pop(0) or ".", os.path.dirname(__file__)
    if os.path.exists(current) and os.path.samefile(current, os.path.dirname(package)):
        sys.path.append(current)


if __name__ == "__main__":
    _leave_current_folder()
    sys.exit(run())
