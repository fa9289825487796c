#!/usr/bin/env python3
"""Checks the hosts of a run before it: versions, devices, network, memory, files, clock.

    python launch/preflight.py [--bucket gs://my-bucket] [--data gs://my-bucket/imagenet]
        [--devices N] [--dry-run]

Start it on all hosts as the run would be: `preflight` of the scripts here does. Process 0 says what
it found, the others what is wrong with them. Exit code 2 if something is,
after which nothing starts it again.
"""

import argparse
import importlib.metadata
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from arcond_jax.parallel import census
from arcond_jax.run import exclusive

PACKAGES = ("arcond-jax", "jax", "jaxlib", "libtpu", "flax", "orbax-checkpoint", "gcsfs")
TIMEOUT = 120  # seconds that the hosts have to come
SKEW = 5.0  # seconds between clocks: more, and times in logs and of tokens mislead


class CheckError(Exception):
    """Something is not as a run needs it; the message says what and what to do."""


def join() -> str:
    """Makes the processes one program, as `arcond` does."""
    place = census.place(None, None, None, timeout=TIMEOUT)
    if place is None:
        return "alone"
    census.hold(place, {}, host=socket.gethostname(), timeout=TIMEOUT)
    census.initialize(place)
    return f"{jax.process_count()} processes"


def versions() -> str:
    """Of what a run imports."""
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def same_versions() -> str:
    """Whether all hosts have those of process 0."""
    if jax.process_count() == 1:
        return "one host"
    mine = np.frombuffer(versions().encode().ljust(512)[:512], np.uint8)
    first = multihost_utils.broadcast_one_to_all(mine)
    if not np.array_equal(first, mine):
        theirs = bytes(np.asarray(first)).decode().strip()
        raise CheckError(f"{versions()}; process 0 has {theirs}: take one image for all")
    return "as process 0"


def devices(expected: int | None) -> str:
    """Kind and number, in all and here."""
    kind = jax.local_devices()[0].device_kind
    found = f"{jax.device_count()} of {kind}, {jax.local_device_count()} here"
    if expected is not None and jax.device_count() != expected:
        raise CheckError(f"{found}, not {expected}: a host is missing, or --devices is wrong")
    return found


def psum() -> str:
    """One all-reduce over all devices."""
    num_devices = jax.device_count()
    mesh = jax.make_mesh((num_devices,), ("all",))
    spec = PartitionSpec("all")
    ones = jax.make_array_from_callback(
        (num_devices,),
        jax.sharding.NamedSharding(mesh, spec),
        lambda index: np.ones(num_devices, np.float32)[index],
    )
    reduce = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()
        )
    )
    start = time.perf_counter()
    total = float(reduce(ones).addressable_data(0)[0])
    seconds = time.perf_counter() - start
    if total != num_devices:
        raise CheckError(f"the sum of {num_devices} ones is {total}: a chip or a link is broken")
    return f"{num_devices} ones add up, {seconds:.1f} s with compiling"


def clock() -> str:
    """How far apart the clocks of the hosts are."""
    if jax.process_count() == 1:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    multihost_utils.sync_global_devices("clock")
    day = np.int32(time.time() * 1000 % 86_400_000)  # milliseconds; jax has no 64 bits here
    days = np.asarray(multihost_utils.process_allgather(day)).ravel().astype(np.int64)
    apart = (days - days[0] + 43_200_000) % 86_400_000 - 43_200_000  # over midnight
    spread = (apart.max() - apart.min()) / 1000
    if spread > SKEW:
        worst = int(np.abs(apart).argmax())
        raise CheckError(f"{spread:.1f} s apart, process {worst} most: start NTP on its host")
    return f"at most {spread:.1f} s apart"


def memory() -> str:
    """Of a device and of this host."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    stats = jax.local_devices()[0].memory_stats() or {}
    limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
    if limit is None:
        return f"host {host:.0f} GiB"
    if used > limit / 10:
        raise CheckError(f"{used / 2**30:.1f} GiB of a device are in use: end what else runs there")
    return f"device {limit / 2**30:.1f} GiB, host {host:.0f} GiB"


def bucket(folder: epath.Path) -> str:
    """Writes a file, reads it and removes it."""
    path = folder / f"preflight_{uuid.uuid4().hex}"
    content = os.urandom(2**20)
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    try:
        if path.read_bytes() != content:
            raise CheckError(f"{folder} gives back other bytes than were written")
    finally:
        path.unlink()
    return f"1 MiB to {folder} and back in {time.perf_counter() - start:.1f} s"


def shared(folder: epath.Path) -> str:
    """Whether all hosts see there what process 0 writes."""
    exclusive.check_shared(folder)
    return f"{folder} is one folder for all"


def data(folder: epath.Path) -> str:
    """Whether the data are where the config will look."""
    if not folder.exists():
        raise CheckError(f"{folder} does not exist, or this host may not read it")
    first = next(iter(folder.iterdir()), None)
    if first is None:
        raise CheckError(f"{folder} is empty")
    return f"{folder} has {first.name}"


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bucket", type=epath.Path, help="a folder to write to")
    parser.add_argument("--data", type=epath.Path, help="a folder to read from")
    parser.add_argument("--devices", type=int, metavar="N", help="how many there must be in all")
    parser.add_argument("--dry-run", action="store_true", help="name the checks")
    args = parser.parse_args(argv)

    # What needs all hosts comes first: no host may wait for one that has failed alone.
    checks: list[tuple[str, Callable[[], str]]] = [
        ("processes", join),
        ("devices", lambda: devices(args.devices)),
        ("psum", psum),
        ("clock", clock),
        ("same versions", same_versions),
        ("versions", versions),
        ("memory", memory),
    ]
    if args.bucket is not None:
        checks.insert(4, ("shared", lambda: shared(args.bucket)))
        checks.append(("bucket", lambda: bucket(args.bucket)))
    if args.data is not None:
        checks.append(("data", lambda: data(args.data)))
    if args.dry_run:
        print("\n".join(name for name, _ in checks))
        return 0

    failed = 0
    for name, check in checks:
        try:
            found = check()
        except Exception as error:  # of the network, of a file system, of a chip
            failed += 1
            message = " ".join(str(error).split())[:300] or type(error).__name__
            print(f"FAILED  {name} on {socket.gethostname()}: {message}", file=sys.stderr)
            if name == "processes":
                break  # the rest would be of this host alone
        else:
            if jax.process_index() == 0:
                print(f"ok      {name}: {found}", flush=True)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
