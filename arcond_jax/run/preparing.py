"""Images of any source into a folder of shards to train from: checked, resumable, on many hosts."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from arcond_jax.data import finding, images, listing, records
from arcond_jax.run import progress as progress_lib
from arcond_jax.run import sharded

SHARD_BYTES = 512 * 2**20
AHEAD = 4  # images in work for each thread


@dataclasses.dataclass(frozen=True)
class Options:
    """What is made of the images.

    Attributes:
      held_out: Share of each class that is held out, where the source holds nothing out.
      seed: Of the choice of these.
      resize: Side in pixels of the crops to keep in place of the images.
      stop_on_error: Whether an image that cannot be read ends it; it is left out otherwise.
      class_names: In the order of their ids, for sources that know ids alone.
      shard_bytes: Size of a shard, nearly.
    """

    held_out: float | None = None
    seed: int = 0
    resize: int | None = None
    stop_on_error: bool = False
    class_names: tuple[str, ...] | None = None
    shard_bytes: int = SHARD_BYTES


def prepare(
    sources: Sequence[pathlib.Path],
    out: pathlib.Path,
    options: Options = Options(),
    *,
    num_threads: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> dict[str, Any]:
    """Writes the shards of this process, and the manifest once all shards are there.

    Args:
      sources: See `finding.find`.
      out: Folder to write, or to go on with.
      num_threads: That decode; as many as there are cores by default.
      process_index, process_count: Which of how many processes this is; all of them see `out`.

    Returns:
      The manifest; its `complete` is False while shards of other processes are missing.

    Raises:
      ImportError: The source needs an extra.
      OSError: `out` cannot be written to.
      ValueError: The source cannot be listed, `out` holds something else, or an image cannot be
        read and `options.stop_on_error` is set.
    """
    sharded.check_out(sources, out)
    splits = _splits(sources, options)
    shards = _shards(splits, options)
    plan = sharded.begin(out, _plan(sources, splits, options), shards)
    missing, progress = sharded.unfinished(out, shards, process_index, process_count)
    num_threads = num_threads or os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool, progress:
        for shard in missing:
            checked = _checked_in_order(pool, num_threads, splits, shard, options.resize)
            _write(out, shard, splits[shard.split], checked, options, progress)
    known = sharded.all_known(out, shards)
    return plan if known is None else sharded.finish(out, plan, shards, known)


def _splits(sources: Sequence[pathlib.Path], options: Options) -> dict[str, listing.Listing]:
    splits = finding.find(sources, class_names=options.class_names)
    if options.held_out is not None:
        if "train" not in splits:
            raise ValueError("the source has no train split to hold out from: leave out --held_out")
        if "held_out" in splits:
            raise ValueError("the source has held-out images of its own: leave out --held_out")
        train, held_out = listing.held_out_of(splits["train"], options.held_out, seed=options.seed)
        splits = {"train": train, "held_out": held_out}
    for name, split in splits.items():
        logging.info(
            "%s: %d images of %d classes, %.1f GB (%s)",
            name,
            len(split),
            len(np.unique(split.label)),
            split.size.sum() / 1e9,
            split.kind,
        )
    return splits


def _shards(splits: dict[str, listing.Listing], options: Options) -> list[sharded.Shard]:
    shards = []
    for name, split in splits.items():
        # Lossless WebP takes about 1.4 bytes a pixel.
        size = np.full(len(split), 1.4 * options.resize**2) if options.resize else split.size
        before = np.cumsum(size) - size
        _, starts = np.unique(before // options.shard_bytes, return_index=True)
        shards += sharded.cut(name, starts.tolist(), len(split))
    return shards


def _plan(
    sources: Sequence[pathlib.Path],
    splits: dict[str, listing.Listing],
    options: Options,
) -> dict[str, Any]:
    """The manifest before anything is written; whoever goes on must come to the same one."""
    digest = hashlib.sha256()
    for name, split in splits.items():
        for label, image in zip(split.label.tolist(), split.names, strict=True):
            digest.update(f"{name}\t{label}\t{image}\n".encode("utf-8", "surrogateescape"))
    first = next(iter(splits.values()))
    return {
        "kind": "images",
        "class_names": list(first.class_names),
        "image_size": options.resize,
        "source": {
            "name": ", ".join(source.name for source in sources),
            "kind": first.kind,
            "count": {name: len(split) for name, split in splits.items()},
            "sha256": digest.hexdigest(),  # over split, label and name of every image
        },
    }


def _write(
    out: pathlib.Path,
    shard: sharded.Shard,
    split: listing.Listing,
    checked: Iterator[bytes | str],
    options: Options,
    progress: progress_lib.Progress,
) -> None:
    """Writes a shard of the images that can be read, and then what is known of it."""
    label: list[int] = []
    failed: list[list[str]] = []

    def good() -> Iterator[bytes]:
        for row, content in zip(range(shard.start, shard.stop), checked, strict=True):
            progress.add()
            if isinstance(content, str):
                failed.append([split.names[row], content])
                logging.warning("%s: %s", split.names[row], content)
            else:
                label.append(int(split.label[row]))
                yield records.pack(label[-1], split.names[row], content)

    records.write_shard(out / shard.file, good())
    if failed and options.stop_on_error:
        (out / shard.file).unlink()
        sharded.write_failed(out, failed)
        raise ValueError(
            f"{failed[0][0]} {failed[0][1]}; {out / sharded.FAILED} lists all {len(failed)} of "
            "this shard: repair them, or leave them out by --on_error skip"
        )
    sharded.keep(out, shard, label, failed)
    progress.say(shard.file)


def _checked_in_order(
    pool: concurrent.futures.ThreadPoolExecutor,
    num_threads: int,
    splits: dict[str, listing.Listing],
    shard: sharded.Shard,
    resize: int | None,
) -> Iterator[bytes | str]:
    """`_checked` of the images of a shard; no more than a few are held at a time."""
    pending: collections.deque[concurrent.futures.Future[bytes | str]] = collections.deque()
    for row in range(shard.start, shard.stop):
        pending.append(pool.submit(_checked, splits[shard.split], row, resize))
        if len(pending) > AHEAD * num_threads:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _checked(split: listing.Listing, row: int, resize: int | None) -> bytes | str:
    """The bytes to keep of an image, which has been decoded once; or what is wrong with it."""
    name = split.names[row]
    try:
        encoded = split.read(row)
        if resize is None:
            image = images.open_image(name, num_channels=3, encoded=encoded)
            images.check_aspect(name, image.size)
            return encoded
        content = io.BytesIO()
        Image.fromarray(images.open_square(name, resize, num_channels=3, encoded=encoded)).save(
            content, "WEBP", lossless=True
        )
        return content.getvalue()
    except images.UnreadableError as error:
        return error.why
    except (ValueError, OSError) as error:
        why = str(getattr(error, "strerror", None) or error)
        return " ".join(why.split())
