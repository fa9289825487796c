"""From a source of single images to batches of numpy arrays; the only door to Grain.

A source knows its length and returns item i as `{"image": ..., "label": int32}`, images in uint8,
or in float32 within [-1, 1] where 256 levels do not hold them; batches keep what a source gives.
Training reads it shuffled and without end, evaluation once and in order. The shuffled order is a
property of (source, seed, global batch size) alone, never of the number of processes, so a run
that stops on 16 hosts continues on 4 with the same batches.

A source may have several views of each image, such as its mirror image. Training takes one of them,
by (seed, epoch, index) alone.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from grain.experimental import index_shuffle

# What waits for its turn at each process: enough to hide a slow item, and never more than a host
# has room for; a batch of 2,048 images of 256x256x3 is 0.4 GB.
PREFETCH_BATCHES = 8
PREFETCH_BYTES = 10**9
PIECES = 32  # of a batch, which threads take one after another

NumpyBatch = dict[str, np.ndarray]  # stacked items: "image" [b, height, width, channels], "label"
Arrays = dict[str, tuple[tuple[int, ...], np.dtype]]  # shape and type of what items hold, by name


@runtime_checkable  # annotations are checked at run time in the tests
class Source(Protocol):
    """Random access to the images of one split."""

    num_classes: int
    image_shape: tuple[int, int, int]  # height, width, channels
    image_dtype: np.dtype  # uint8 or float32
    label_names: tuple[str, ...]
    label: np.ndarray  # int32 [n], of every item

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


@runtime_checkable  # annotations are checked at run time in the tests
class Viewed(Protocol):
    """Random access to one or several views of each image of a split: pixels, or what is stored.

    A view is the arrays that `arrays` names, and "label".

    Attributes:
      num_views: Of each image; training draws one of them.
      arrays: Shape and type of each array of a view.
    """

    num_views: int
    arrays: Arrays
    label_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def view(self, index: int, view: int) -> dict[str, np.ndarray]: ...


class Mirrored:
    """Each image as it is and, as the second of two views, its mirror image."""

    def __init__(self, source: Source, num_views: int = 2):
        self._source, self.num_views = source, num_views
        self.label_names = source.label_names
        self.arrays: Arrays = {"image": (tuple(source.image_shape), source.image_dtype)}

    def __len__(self) -> int:
        return len(self._source)

    def view(self, index: int, view: int) -> dict[str, np.ndarray]:
        item = _read(self._source, index)
        return item | {"image": item["image"][:, ::-1]} if view else item


def train_iterator(
    source: Source | Viewed,
    *,
    global_batch_size: int,
    seed: int,
    rows: np.ndarray | None = None,
    num_threads: int | None = None,
    prefetch_bytes: int = PREFETCH_BYTES,
) -> grain.DatasetIterator:
    """Endless shuffled batches of this process, with a position that can be saved.

    Every epoch is a new permutation of the whole source, with views drawn anew, and epochs follow
    each other without a gap: a batch may hold the end of one and the start of the next. One batch
    is loaded after another, the items of a batch by several threads.

    Args:
      source: The images, or views of them; read from several threads at once.
      global_batch_size: Images of a step over all processes; at most one epoch.
      seed: Of the order and of the views.
      rows: Of each global batch, those that this process gets, and loads alone; None for all.
      num_threads: As of `pool`; with 0 nothing is loaded ahead.
      prefetch_bytes: Of images loaded ahead, in at most `PREFETCH_BATCHES`; one batch always is.

    Returns:
      An iterator of `NumpyBatch` with `get_state()` and `set_state(state)`. The state is
      `{"next_index": number of batches taken}`: plain JSON, the same on every process.

    Raises:
      ValueError: For batch sizes that do not fit; and from `next`, for an item that cannot be
        read, with its index.
    """
    if not 0 < global_batch_size <= len(source):
        raise ValueError(
            f"global_batch_size {global_batch_size} does not fit a dataset of {len(source)}"
            f" images: use 1 to {len(source)}."
        )
    rows = np.arange(global_batch_size) if rows is None else rows
    source, readers = _with_views(source), pool(num_threads)

    def loaded(number: int) -> NumpyBatch:
        # Positions are those of the global batch: with an order of their own, processes would have
        # other batches whenever their count changes.
        positions = number * global_batch_size + rows
        indices, epochs = shuffled(positions, len(source), seed=seed), positions // len(source)
        views = drawn_views(indices, epochs, seed=seed, num_views=source.num_views)
        return load(source, indices, readers, views)

    batches = grain.MapDataset.range(sys.maxsize).map(loaded)
    item_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in source.arrays.values())
    batch_bytes = len(rows) * item_bytes
    ahead = min(max(1, prefetch_bytes // batch_bytes), PREFETCH_BATCHES) if readers else 0
    options = grain.ReadOptions(num_threads=1 if readers else 0, prefetch_buffer_size=ahead)
    return iter(batches.to_iter_dataset(options))


def shuffled(positions: np.ndarray, length: int, *, seed: int) -> np.ndarray:
    """The item at each position of epochs that follow each other, each a new permutation; int64.

    These are the items of `grain.MapDataset.range(length).seed(seed).shuffle()`, which spends more
    on each of them than on reading a small record.
    """
    (first,) = np.random.SeedSequence((seed, 1)).generate_state(1)  # as Grain has it; of epoch 0
    epochs, places = np.divmod(positions, length)
    seeds = (int(first) + epochs) % 2**32
    pairs = zip(places.tolist(), seeds.tolist(), strict=True)
    found = [index_shuffle(x, max_index=length - 1, seed=y, rounds=4) for x, y in pairs]
    return np.asarray(found, np.int64)


def drawn_views(
    indices: np.ndarray, epochs: np.ndarray, *, seed: int, num_views: int
) -> np.ndarray:
    """The view of each item in its epoch, drawn evenly from (seed, epoch, index) alone; int64.

    Source: the mixing function of SplitMix64 (Steele, Lea and Flood, 2014), once for each of them.
    """
    bits = np.zeros(len(indices), np.uint64)
    for number in (np.full_like(indices, seed), epochs, indices):
        bits = (bits ^ number.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    return (bits % np.uint64(num_views)).astype(np.int64)


class Ahead:
    """An iterator whose next batch is taken and placed by a thread while the last one is used.

    The state counts what was given out, not the batch that is ready.
    """

    def __init__(self, iterator: grain.DatasetIterator, place: Callable[[NumpyBatch], Any]) -> None:
        self._iterator, self._place = iterator, place
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._ready: futures.Future | None = None
        self._state = iterator.get_state()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        ready, self._ready = self._ready or self._thread.submit(self._take), None
        batch, self._state = ready.result()
        self._ready = self._thread.submit(self._take)
        return batch

    def _take(self) -> tuple[Any, dict[str, Any]]:
        batch = self._place(next(self._iterator))
        return batch, self._iterator.get_state()

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        if self._ready is not None:
            if not self._ready.cancel():
                futures.wait([self._ready])
            self._ready = None
        self._iterator.set_state(state)
        self._state = state


def full_batches(
    source: Source | Viewed,
    batch_size: int,
    *,
    at_most: int | None = None,
    rows: np.ndarray | None = None,
    num_threads: int | None = 0,
) -> Iterator[NumpyBatch]:
    """One pass over a split in its own order, in batches of one shape; the first view of each.

    With `at_most` it takes so many items, spread evenly over the split, which may be sorted.

    The last batch is filled up with copies of the last image; the extra entry "valid" (bool) is
    True for the rows that count.

    Args:
      rows: Of each batch, those that this process gets, and reads alone; None for all.

    Raises:
      ValueError: For an item that cannot be read, with its index.
    """
    count = len(source) if at_most is None else min(at_most, len(source))
    chosen = np.arange(count) * len(source) // count
    readers = pool(num_threads)
    for start in range(0, count, batch_size):
        places = start + (np.arange(batch_size) if rows is None else rows)
        batch = load(source, chosen[np.minimum(places, count - 1)], readers)
        yield batch | {"valid": places < count}


def pool(num_threads: int | None) -> futures.ThreadPoolExecutor | None:
    """Threads that read items: None takes the cores of the process, 0 the caller's own thread."""
    if num_threads is None:
        num_threads = _num_cores()
    return (
        futures.ThreadPoolExecutor(num_threads, thread_name_prefix="read") if num_threads else None
    )


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load(
    source: Source | Viewed,
    indices: np.ndarray,
    readers: futures.Executor | None = None,
    views: np.ndarray | None = None,
) -> NumpyBatch:
    """The items of these indices, stacked; raises ValueError for one that cannot be read.

    Args:
      views: Of each; None for the first.
    """
    source = _with_views(source)
    views = np.zeros(len(indices), np.int64) if views is None else views
    arrays = source.arrays | {"label": ((), np.dtype(np.int32))}
    batch = {name: np.empty((len(indices), *shape), x) for name, (shape, x) in arrays.items()}

    def read(rows: np.ndarray) -> None:
        for row in rows:
            item = source.view(int(indices[row]), int(views[row]))
            for name, array in batch.items():
                array[row] = item[name]

    pieces = np.array_split(np.arange(len(indices)), min(PIECES, len(indices)))
    for _ in map(read, pieces) if readers is None else readers.map(read, pieces):
        pass  # an error comes out here
    return batch


def _with_views(source: Source | Viewed) -> Viewed:
    return source if isinstance(source, Viewed) else Mirrored(source, num_views=1)


def _read(source: Source, index: int) -> dict[str, np.ndarray]:
    try:
        item = source[index]
    except Exception as error:
        raise ValueError(
            f"Item {index} of {type(source).__name__} cannot be read ({error}):"
            " repair or remove it."
        ) from error
    found = item["image"].shape, item["image"].dtype
    expected = tuple(source.image_shape), source.image_dtype
    for what, value, wanted in zip(("shape", "type"), found, expected, strict=True):
        if value != wanted:
            raise ValueError(
                f"Item {index} of {type(source).__name__} has image {what} {value},"
                f" expected {wanted}: repair or remove it."
            )
    return item
