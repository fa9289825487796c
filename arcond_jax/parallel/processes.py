"""What a process holds of an array that lies on the devices of all, and what all agree on.

With one process each of these is what one would write without it.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # jax has no public name for what processes tell each other
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float32, Int

from arcond_jax.parallel import mesh as mesh_lib

DAY = 24 * 60 * 60 * 1000  # milliseconds
_meetings = itertools.count()

# What gRPC, the coordination service and the collectives of a CPU say of a peer that is gone.
LOST = (
    "Gloo",
    "Connection reset by peer",
    "Connection closed by peer",
    "Socket closed",
    "coordination service",
    "heartbeat",
    "UNAVAILABLE",
)


def are_several() -> bool:
    """Whether this process is one of several; asks for no device."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process writes what is written once: files, pictures, lines of progress."""
    return not are_several() or jax.process_index() == 0


def local_rows(mesh: Mesh, num_rows: int) -> Int[np.ndarray, " r"]:
    """Those of a batch that lie on devices of this process, in order.

    Args:
      num_rows: Of the batch; a multiple of its shards.
    """
    places: Any = mesh_lib.batch_sharding(mesh).addressable_devices_indices_map((num_rows,))
    rows = np.arange(num_rows)
    return np.unique([rows[place] for place in places.values()])


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """The `local_rows` of each process to global arrays, sharded over the batch axes."""
    sharding = mesh_lib.batch_sharding(mesh)
    if not are_several():
        return jax.device_put(batch, sharding)
    shards = mesh_lib.num_batch_shards(mesh)
    here = len(local_rows(mesh, shards))

    def place(x: np.ndarray) -> jax.Array:
        num_rows = len(x) * shards // here
        at = np.zeros(num_rows, np.int64)
        at[local_rows(mesh, num_rows)] = np.arange(len(x))

        def part(index: Any) -> np.ndarray:
            return x[at[index[0]]]

        return jax.make_array_from_callback((num_rows, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """What every process has whole to its place on the mesh."""
    if not are_several():
        return jax.device_put(tree, sharding)
    return jax.tree.map(functools.partial(_put, sharding=sharding), tree)


def _put(x: Any, *, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    whole = np.asarray(fetch(x))
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def fetch(tree: Any) -> Any:
    """Arrays of the devices, whole, to the host of every process; all have to ask."""
    return jax.tree.map(_fetched, tree)


def _fetched(x: Any) -> Any:
    elsewhere = isinstance(x, jax.Array) and not x.is_fully_addressable
    if elsewhere and not x.is_fully_replicated:
        return multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(x)


def from_first(make: Callable[[], Any], abstract: Any) -> Any:
    """What `make` gives in the first process, in all of them.

    Two machines may not come to the same numbers to the last bit, and then to different programs.

    Args:
      abstract: Its shapes and types.
    """
    if not are_several():
        return make()
    zeros = functools.partial(jax.tree.map, lambda x: np.zeros(x.shape, x.dtype))
    tree = make() if is_first() else zeros(abstract)
    together()
    return multihost_utils.broadcast_one_to_all(jax.tree.map(np.asarray, tree))


def each(arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of every process, in their order, bit for bit; all have to ask, with one shape."""
    if not are_several():
        yield dict(arrays)
        return
    bits = {name: _bits(x) for name, x in arrays.items()}  # jax has no 64 bits here
    for index in range(jax.process_count()):
        sent = multihost_utils.broadcast_one_to_all(bits, index == jax.process_index())
        yield {
            name: np.asarray(sent[name]).view(x.dtype).reshape(x.shape)
            for name, x in arrays.items()
        }


def added(rows: Float32[np.ndarray, "n d"], *, at_a_time: int = 1024) -> None:
    """Adds up in place what processes hold of one array, each row other than 0 in one of them."""
    if not are_several():
        return
    for start in range(0, len(rows), at_a_time):
        part = rows[start : start + at_a_time]
        part[:] = np.sum(multihost_utils.process_allgather(part), axis=0)


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint32)


def together() -> None:
    """Waits for all processes, for a day if need be: before or after what one of them does alone.

    Not on the devices: the first collective of CPUs gives up when one is half a minute late.
    """
    if are_several():
        client().wait_at_barrier(f"together {next(_meetings)}", DAY)


def lost_another(error: BaseException | None) -> str | None:
    """What an error, or one that it came from, says of a process that is gone; None for others."""
    while are_several() and error is not None:
        if error.__cause__ is None and any(mark in str(error) for mark in LOST):
            return " ".join(str(error).split())
        error = error.__cause__
    return None


def client() -> Any:
    """What all processes write to and read from, at the first of them."""
    return distributed.global_state.client


def anywhere(flag: bool) -> bool:
    """Whether a flag is up on any process; all have to ask, and have one answer."""
    return bool(_anywhere(flag)) if are_several() else flag


class Agreed:
    """A flag that is up on any process, asked by all at every step without waiting for a device.

    All have the same answer at the same call: with several processes that of the call before.
    """

    def __init__(self, flag: Callable[[], bool]) -> None:
        self._flag = flag
        self._asked: jax.Array | bool = False

    def __call__(self) -> bool:
        if not are_several():
            return self._flag()
        before, self._asked = self._asked, _anywhere(self._flag())
        return bool(before)


def _anywhere(flag: bool) -> jax.Array:
    mesh = _everywhere()
    rows = np.full(jax.local_device_count(), flag)
    with jax.set_mesh(mesh):
        return _any(put_batch(rows, mesh))


@functools.cache
def _everywhere() -> Mesh:
    return mesh_lib.make_mesh()


@jax.jit
def _any(flags: jax.Array) -> jax.Array:
    return jnp.any(flags)


def least(number: int) -> int:
    """The least of a number that processes may know differently; all have to ask."""
    if not are_several():
        return number
    halves = np.asarray(divmod(number, 2**31), np.int32)  # jax has no 64 bits here
    all_halves = multihost_utils.process_allgather(halves)
    return min(int(high) * 2**31 + int(low) for high, low in all_halves)
