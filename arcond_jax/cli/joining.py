"""Processes on several hosts that run one command together."""

import argparse
import contextlib
import importlib.metadata
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence

import jax

from arcond_jax import build
from arcond_jax import config as config_lib
from arcond_jax.cli import failing
from arcond_jax.parallel import census, processes
from arcond_jax.training import stopping

TIMEOUT = 300
# Of a process that is gone without a word the others hear within this many seconds, and end.
HEARTBEAT, SHUTDOWN = 45, 60
STALL = 30.0  # minutes, of training; what else there is may take hours for one batch
FAILURE = "arcond/failure"  # what the first process to fail says, for the others
ASKED, HEARD = 1.0, 4.0  # seconds between two looks for it, and in which all have looked
OWN = ("--process_id", "--coordinator_address", "--num_processes", "--initialization_timeout")


def add_arguments(parser: argparse.ArgumentParser, *, stall_minutes: float | None) -> None:
    """Flags of the commands that processes run together.

    Args:
      stall_minutes: Default of the flag of that name.
    """
    group = parser.add_argument_group(
        "several hosts",
        "one process on each, started alike; by themselves on TPU slices, under Slurm and Open MPI",
    )
    group.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="of process 0; JAX_COORDINATOR_ADDRESS"
    )
    group.add_argument("--num_processes", type=int, metavar="N", help="JAX_NUM_PROCESSES")
    group.add_argument("--process_id", type=int, metavar="I", help="JAX_PROCESS_ID")
    group.add_argument(
        "--initialization_timeout",
        type=int,
        default=TIMEOUT,
        metavar="SECONDS",
        help=f"to wait for the others, and then to name who is missing; default: {TIMEOUT}",
    )
    group.add_argument(
        "--stall_minutes",
        type=_minutes,
        default=stall_minutes,
        metavar="MINUTES",
        help="without the end of a step or batch show all stacks and exit 124; compilation has "
        f"four times as long, at least an hour; 0: never; default: {stall_minutes or 0:g}",
    )


def _minutes(text: str) -> float | None:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number of minutes, at least 0")
    return minutes or None


def join(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Makes this process one of several if it is; before any array of jax.

    The first one alone speaks from then on, but for errors.

    Raises:
      census.CensusError: They cannot be one program.
      build.ConfigError: The config is none.
    """
    timeout = args.initialization_timeout
    place = census.place(
        args.coordinator_address, args.num_processes, args.process_id, timeout=timeout
    )
    if place is None:
        return
    about = {
        "jax": jax.__version__,
        "arcond_jax": importlib.metadata.version("arcond_jax"),
        "command": _without_own(argv),
        "config": _config(args),
    }
    census.hold(place, about, host=socket.gethostname(), timeout=timeout)
    # Signals stay with `training.stopping`, whose answer all processes agree on.
    jax.config.update("jax_enable_preemption_service", False)
    census.initialize(
        place,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    if not processes.is_first():
        logging.getLogger().setLevel(logging.WARNING)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # stays open
    threading.Thread(target=_listen, args=(place.process_id,), daemon=True).start()


def leave(code: int, line: str | None) -> None:
    """Ends a process that failed among others, and them: they would wait for each other.

    Args:
      line: Why it failed; it is printed here already. The others print it too, and end alike.
    """
    if not processes.are_several() or code in (0, failing.STOPPED):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    told = {"process": jax.process_index(), "host": socket.gethostname(), "code": code}
    client = processes.client()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or all is lost
        client.key_value_set(FAILURE, json.dumps(told | {"line": line}))
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        code = json.loads(client.key_value_try_get(FAILURE))["code"]
        time.sleep(_until_heard())
    os._exit(code)


def _listen(process_id: int) -> None:
    """Ends this process when another one failed: it may wait for that in C++, for ever."""
    while True:
        time.sleep(ASKED)
        try:
            told = json.loads(processes.client().key_value_try_get(FAILURE))
        except jax.errors.JaxRuntimeError:  # none failed
            continue
        except AttributeError:  # the client is gone: jax ends with the command
            return
        if told["process"] == process_id:
            return
        stopping.say(f"process {told['process']} on {told['host']}: {told['line']}\n")
        time.sleep(_until_heard() if process_id == 0 else 0)
        os._exit(told["code"])


def _until_heard() -> float:
    """Seconds; longer in the first process, as the others abort when that is gone."""
    return HEARD if jax.process_index() else 2 * HEARD


def _config(args: argparse.Namespace) -> list[str]:
    path = getattr(args, "config", None)
    if path is None:
        return list(args.overrides)
    loaded = build.load_config(path, args.overrides)
    return [f"{name}={value!r}" for name, value in sorted(config_lib.flat(loaded).items())]


def _without_own(argv: Sequence[str]) -> list[str]:
    """The command without what may differ between processes."""
    kept, skipped = [], False
    for word in argv:
        own = word.partition("=")[0] in OWN
        if not (own or skipped):
            kept.append(word)
        skipped = own and "=" not in word
    return kept
