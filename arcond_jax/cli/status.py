"""`arcond status`: how a run is doing, in five lines."""

import argparse
import time

from arcond_jax.cli import paths
from arcond_jax.run import status as status_lib

EPILOG = """examples:
  arcond status --workdir runs/digits
  arcond status --workdir gs://bucket/runs/mar

Read from the log and the checkpoints, so a run is asked nothing and need not be here: one that was
killed shows by lines that are long overdue."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=paths.folder, help="of arcond train")


def main(args: argparse.Namespace) -> None:
    found, now = status_lib.status(args.workdir), time.time()
    print(f"step:            {found.step} of {found.num_train_steps}, {found.name}")
    print(f"rate:            {_rate(found)}")
    print(f"time left:       {_left(found, now)}")
    print(f"last checkpoint: {_checkpoint(found, now)}")
    print(f"skipped updates: {found.line.get('skipped_updates') or 0:.0f}")


def _rate(found: status_lib.Status) -> str:
    if "steps_per_second" not in found.line:
        return "not logged yet"
    parts = [f"{found.line['steps_per_second']:.3g} steps/s"]
    for name, form in (
        ("images_per_second", "{:.3g} images/s"),
        ("data_wait_share", "{:.0%} of the time waiting for data"),
        ("mfu", "MFU {:.0%}"),
        ("peak_memory_gib", "{:.1f} GiB at most"),
    ):
        if name in found.line:
            parts.append(form.format(found.line[name]))
    return ", ".join(parts)


def _left(found: status_lib.Status, now: float) -> str:
    if found.complete:
        return "none: complete"
    if found.seconds_left is None or found.logged_at is None:
        return "not known yet"
    stopped = ", stopped it seems" if found.is_silent(now) else ""
    left, ago = _time(found.seconds_left), _time(now - found.logged_at)
    return f"{left}; last line {ago} ago{stopped}"


def _checkpoint(found: status_lib.Status, now: float) -> str:
    if not found.checkpoints:
        return "none"
    step = max(found.checkpoints)
    return f"step {step}, {_time(now - found.checkpoints[step])} ago"


def _time(seconds: float) -> str:
    """The two largest units."""
    whole = max(0, round(seconds))
    for unit, larger, smaller in ((86400, "d", "h"), (3600, "h", "min"), (60, "min", "s")):
        if whole >= unit:
            rest = whole % unit // {86400: 3600, 3600: 60, 60: 1}[unit]
            return f"{whole // unit} {larger} {rest} {smaller}"
    return f"{whole} s"
