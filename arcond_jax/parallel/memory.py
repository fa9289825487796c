"""How many rows go through a program at a time, by the memory that the compiler says it takes."""

import math
import os
import pathlib
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.parallel import processes

SHARE = 0.5  # of the memory that a program's arguments leave; the rest is for what else there is
CONTAINER_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")


def batch_size(
    lower: Callable[[int], jax.stages.Lowered], num_rows: int, *, at_most: int, mesh: Mesh
) -> int:
    """Rows of equal batches, as few batches as memory allows.

    A program is compiled for a batch, and for a smaller one while it takes more than half of what
    its arguments leave of a device's memory. jax keeps what it compiled, so that the program which
    fits is not compiled again.

    Args:
      lower: The program for a number of rows.
      num_rows: All that there are.
      at_most: Rows of a batch.
      mesh: Where the program runs; a batch is a multiple of its batch shards.
    """
    num_batches = -(-num_rows // at_most)
    while True:
        size = mesh_lib.spread_over(mesh, -(-num_rows // num_batches))
        excess = _of_program(lower(size), mesh) / SHARE
        if excess <= 1.0 or size == mesh_lib.num_batch_shards(mesh):
            return size
        num_batches = math.ceil(num_batches * excess)


def halved(lower: Callable[[int], jax.stages.Lowered], num_rows: int, *, mesh: Mesh) -> int:
    """Rows on each device, `num_rows` if they fit; else halved until they do.

    Other machines come to the same number, where a batch by memory would be one of many.

    Args:
      lower: The program for a number of rows on all devices.
      num_rows: Rows on each device.
      mesh: Where the program runs.
    """
    shards = mesh_lib.num_batch_shards(mesh)
    while num_rows > 1 and _of_program(lower(num_rows * shards), mesh) > SHARE:
        num_rows //= 2
    return num_rows


def share(num_bytes: int, *, beside: int, mesh: Mesh) -> float:
    """What bytes take of the memory of a device that others leave."""
    return num_bytes / max(1, of_device(mesh) - beside)


def _of_program(lowered: jax.stages.Lowered, mesh: Mesh) -> float:
    sizes = lowered.compile().memory_analysis()
    if sizes is None:  # the backend does not say
        return 0.0
    taken = sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    return share(taken, beside=sizes.argument_size_in_bytes, mesh=mesh)


def of_device(mesh: Mesh) -> int:
    """Bytes of one device of the mesh, the same for all processes; a CPU device has its part."""
    devices = mesh.local_devices
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    return processes.least(limit or _of_machine() // len(devices))


def _of_machine() -> int:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit: "max"
        return machine
