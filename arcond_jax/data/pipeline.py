"""From a source of single images to batches of numpy arrays; the only door to Grain.

A source knows its length and returns item i as `{"image": float32 in [-1, 1], "label": int32}`.
Training reads it shuffled and without end, evaluation once and in order. The shuffled order is a
property of (source, seed, global batch size) alone, never of the number of processes, so a run
that stops on 16 hosts continues on 4 with the same batches.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import grain
import numpy as np

PREFETCH_BATCHES = 8  # enough to hide a slow item; a batch of 256 images of 256x256x3 is 0.2 GB

NumpyBatch = dict[str, np.ndarray]  # stacked items: "image" [b, height, width, channels], "label"


@runtime_checkable  # annotations are checked at run time in the tests
class Source(Protocol):
    """Random access to the images of one split."""

    num_classes: int
    image_shape: tuple[int, int, int]  # height, width, channels
    label_names: tuple[str, ...]
    label: np.ndarray  # int32 [n], of every item

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def train_iterator(
    source: Source,
    *,
    global_batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
) -> grain.DatasetIterator:
    """Endless shuffled batches of this process, with a position that can be saved.

    Every epoch is a new permutation of the whole source, and epochs follow each other without a
    gap: a batch may hold the end of one and the start of the next. Process p gets rows
    [p, p + 1) * global_batch_size / process_count of each global batch and loads only those.

    Args:
      source: The images; read from several threads at once.
      global_batch_size: Images of a step over all processes; at most one epoch.
      seed: Of the order.
      process_index: Which rows this process gets; `jax.process_index()`.
      process_count: `jax.process_count()`; divides the batch size.
      num_threads: Reader threads; 0 loads in the caller's thread.

    Returns:
      An iterator of `NumpyBatch` with `get_state()` and `set_state(state)`. The state is
      `{"next_index": number of batches taken}`: plain JSON, the same on every process.

    Raises:
      ValueError: For batch sizes that do not fit; and from `next`, for an item that cannot be
        read, with its index.
    """
    if global_batch_size % process_count:
        raise ValueError(
            f"global_batch_size {global_batch_size} is not divisible by {process_count} processes:"
            f" use a multiple of {process_count}."
        )
    if not 0 < global_batch_size <= len(source):
        raise ValueError(
            f"global_batch_size {global_batch_size} does not fit a dataset of {len(source)}"
            f" images: use 1 to {len(source)}."
        )
    local_batch_size = global_batch_size // process_count
    rows = slice(process_index * local_batch_size, (process_index + 1) * local_batch_size)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    # Indices are batched, and images loaded after the cut: sharding first would give each process
    # count its own order.
    batches = order.batch(global_batch_size, drop_remainder=True).map(
        lambda indices: load(source, indices[rows])
    )
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=PREFETCH_BATCHES if num_threads else 0
    )
    return iter(batches.to_iter_dataset(options))


def full_batches(
    source: Source, batch_size: int, *, at_most: int | None = None
) -> Iterator[NumpyBatch]:
    """One pass over a split in its own order, in batches of one shape.

    With `at_most` it takes so many items, spread evenly over the split, which may be sorted.

    The last batch is filled up with copies of the last image; the extra entry "valid" (bool) is
    True for the rows that count. Every process reads everything.

    Raises:
      ValueError: For an item that cannot be read, with its index.
    """
    count = len(source) if at_most is None else min(at_most, len(source))
    chosen = np.arange(count) * len(source) // count
    for start in range(0, count, batch_size):
        places = np.arange(start, start + batch_size)
        batch = load(source, chosen[np.minimum(places, count - 1)])
        yield batch | {"valid": places < count}


def load(source: Source, indices: np.ndarray) -> NumpyBatch:
    """The items of these indices, stacked; raises ValueError for one that cannot be read."""
    items = [_read(source, int(index)) for index in indices]
    return {name: np.stack([item[name] for item in items]) for name in ("image", "label")}


def _read(source: Source, index: int) -> dict[str, np.ndarray]:
    try:
        item = source[index]
    except Exception as error:
        raise ValueError(
            f"Item {index} of {type(source).__name__} cannot be read ({error}):"
            " repair or remove it."
        ) from error
    if item["image"].shape != tuple(source.image_shape):
        raise ValueError(
            f"Item {index} of {type(source).__name__} has image shape {item['image'].shape},"
            f" expected {tuple(source.image_shape)}: repair or remove it."
        )
    return item
