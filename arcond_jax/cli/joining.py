"""Processes on several hosts that run one command together."""

import argparse
import hashlib
import importlib.metadata
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence

import jax

from arcond_jax import build
from arcond_jax import config as config_lib
from arcond_jax.cli import failing
from arcond_jax.parallel import census, processes

TIMEOUT = 300
# Of a process that is gone without a word the others hear within this many seconds, and end.
HEARTBEAT, SHUTDOWN = 45, 60
OWN = ("--process_id", "--coordinator_address", "--num_processes", "--initialization_timeout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the commands that processes run together."""
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
        "command": _digest(_without_own(argv)),
        "config": _digest(_config(args)),
    }
    census.hold(place, about, host=socket.gethostname(), timeout=timeout)
    # Signals stay with `training.stopping`, whose answer all processes agree on.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator_address,
        place.num_processes,
        place.process_id,
        place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    if not processes.is_first():
        logging.getLogger().setLevel(logging.WARNING)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # stays open


def leave(code: int) -> None:
    """Ends a process that failed among others at once: at its exit it would wait for them."""
    if processes.are_several() and code not in (0, failing.STOPPED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _config(args: argparse.Namespace) -> str:
    config = getattr(args, "config", None)
    if config is None:
        return json.dumps(args.overrides)
    loaded = build.load_config(config, args.overrides)
    return repr(sorted(config_lib.flat(loaded).items()))


def _without_own(argv: Sequence[str]) -> list[str]:
    """The command without what may differ between processes."""
    kept, skipped = [], False
    for word in argv:
        own = word.partition("=")[0] in OWN
        if not (own or skipped):
            kept.append(word)
        skipped = own and "=" not in word
    return kept


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
