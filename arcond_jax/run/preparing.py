"""Images of any source into a folder of shards to train from: checked, resumable, on many hosts.

The plan, which image goes into which shard, follows from the source and the settings alone. Shard s
is written by process s modulo the number of processes, whole or not at all, so that a process that
was killed goes on with the shard it was at, and all ways lead to the same bytes.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from arcond_jax import atomic
from arcond_jax.data import finding, images, listing, records

SHARD_BYTES = 512 * 2**20
PROGRESS = "progress"  # folder of what is known of each shard that is written
FAILED = "failed.txt"
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


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A shard of the plan: images [start, stop) of a split."""

    split: str
    file: str
    start: int
    stop: int


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
    _check_out(sources, out)
    splits = _splits(sources, options)
    shards = _shards(splits, options)
    manifest = _begin(out, _plan(sources, splits, shards, options))
    mine = [shard for i, shard in enumerate(shards) if i % process_count == process_index]
    done = [shard for shard in mine if _finished(out, shard) is not None]
    progress = _Progress(mine, done)
    num_threads = num_threads or os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool, progress:
        for shard in mine:
            if shard not in done:
                checked = _checked_in_order(pool, num_threads, splits, shard, options.resize)
                _write(out, shard, splits[shard.split], checked, options, progress)
    return _finish(out, shards, manifest)


def _check_out(sources: Sequence[pathlib.Path], out: pathlib.Path) -> None:
    if "://" in str(out) or str(out).startswith("gs:/"):
        raise ValueError(f"{out} is a bucket: prepare into a local folder, and copy it there")
    for source in sources:
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"{out} is inside of the source {source}: write to a folder beside it")
    if out.exists() and not records.is_prepared(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something else: give a folder that is empty or not there")


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


def _shards(splits: dict[str, listing.Listing], options: Options) -> list[_Shard]:
    shards = []
    for name, split in splits.items():
        # Lossless WebP takes about 1.4 bytes a pixel.
        size = np.full(len(split), 1.4 * options.resize**2) if options.resize else split.size
        before = np.cumsum(size) - size
        _, starts = np.unique(before // options.shard_bytes, return_index=True)
        stops = [*starts[1:].tolist(), len(split)]
        for i, (start, stop) in enumerate(zip(starts.tolist(), stops, strict=True)):
            file = f"{name}-{i:05d}-of-{len(starts):05d}.array_record"
            shards.append(_Shard(name, file, start, stop))
    return shards


def _plan(
    sources: Sequence[pathlib.Path],
    splits: dict[str, listing.Listing],
    shards: list[_Shard],
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
        "complete": False,
        "class_names": list(first.class_names),
        "image_size": options.resize,
        "source": {
            "name": ", ".join(source.name for source in sources),
            "kind": first.kind,
            "count": {name: len(split) for name, split in splits.items()},
            "sha256": digest.hexdigest(),  # over split, label and name of every image
        },
        "planned": {shard.file: shard.stop - shard.start for shard in shards},
    }


def _begin(out: pathlib.Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Writes the plan, or checks that `out` was begun with the same one."""
    if not records.is_prepared(out):
        (out / PROGRESS).mkdir(parents=True, exist_ok=True)
        records.write_manifest(out, plan)
        return plan
    begun = records.read_manifest(out)
    for name, value in plan.items():
        if name != "complete" and begun.get(name) != value:
            was, now = (json.dumps(x.get(name))[:100] for x in (begun, plan))
            raise ValueError(
                f"{out} was begun with another {name} ({was}, now {now}): the source or the "
                "settings have changed; write to another folder"
            )
    (out / PROGRESS).mkdir(exist_ok=True)
    return plan


def _finished(out: pathlib.Path, shard: _Shard) -> dict[str, Any] | None:
    """What is known of a shard that lies there whole; None for any other."""
    try:
        known = json.loads((out / PROGRESS / f"{shard.file}.json").read_text("utf-8"))
        return known if (out / shard.file).stat().st_size == known["bytes"] else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _write(
    out: pathlib.Path,
    shard: _Shard,
    split: listing.Listing,
    checked: Iterator[bytes | str],
    options: Options,
    progress: "_Progress",
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

    count = records.write_shard(out / shard.file, good())
    if failed and options.stop_on_error:
        (out / shard.file).unlink()
        _write_failed(out, failed)
        raise ValueError(
            f"{failed[0][0]} {failed[0][1]}; {out / FAILED} lists all {len(failed)} of this shard: "
            "repair them, or leave them out by --on_error skip"
        )
    size = (out / shard.file).stat().st_size
    known = {"records": count, "bytes": size, "label": label, "failed": failed}
    atomic.write_text(out / PROGRESS / f"{shard.file}.json", json.dumps(known))
    progress.say(shard)


def _checked_in_order(
    pool: concurrent.futures.ThreadPoolExecutor,
    num_threads: int,
    splits: dict[str, listing.Listing],
    shard: _Shard,
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
    except (ValueError, OSError) as error:
        return " ".join(str(error).removeprefix(f"{name} ").removeprefix(f"{name}: ").split())


def _finish(out: pathlib.Path, shards: list[_Shard], plan: dict[str, Any]) -> dict[str, Any]:
    """The complete manifest, written; or the plan, if shards are missing."""
    found = [(shard, _finished(out, shard)) for shard in shards]
    known = [(shard, x) for shard, x in found if x is not None]
    if len(known) < len(shards):
        return plan
    failed = [pair for _, x in known for pair in x["failed"]]
    _write_failed(out, failed)
    splits = {
        name: _split(out, name, [pair for pair in known if pair[0].split == name], plan)
        for name in dict.fromkeys(shard.split for shard in shards)
    }
    manifest = plan | {"complete": True, "failed": len(failed), "splits": splits}
    records.write_manifest(out, manifest)
    return manifest


def _split(
    out: pathlib.Path,
    name: str,
    known: list[tuple[_Shard, dict[str, Any]]],
    plan: dict[str, Any],
) -> dict[str, Any]:
    """What the manifest says of a split, whose labels are written."""
    label = np.asarray([x for _, shard in known for x in shard["label"]], np.int32)
    counts = np.bincount(label, minlength=len(plan["class_names"])).tolist()
    if 0 in counts and name == "train":
        empty = plan["class_names"][counts.index(0)]
        raise ValueError(
            f"no image of the class {empty!r} can be read (see {out / FAILED}): repair them, "
            "or remove the class"
        )
    return {
        "records": len(label),
        "counts": counts,
        "labels_sha256": records.write_labels(out, name, label),
        "shards": [
            {"file": shard.file, "records": x["records"], "bytes": x["bytes"]} for shard, x in known
        ],
    }


def _write_failed(out: pathlib.Path, failed: list[list[str]]) -> None:
    """Lists the images that cannot be read, one a line."""
    if failed:
        atomic.write_text(out / FAILED, "".join(f"{name}\t{why}\n" for name, why in failed))
    else:
        (out / FAILED).unlink(missing_ok=True)


class _Progress:
    """Images a second and time left: a bar on a terminal, else a line after each shard."""

    def __init__(self, mine: list[_Shard], done: list[_Shard]):
        self._total = sum(shard.stop - shard.start for shard in mine)
        self._before = self._now = sum(shard.stop - shard.start for shard in done)
        self._began = time.monotonic()
        self._bar = tqdm.tqdm(
            total=self._total,
            initial=self._now,
            unit=" images",
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self) -> None:
        self._now += 1
        self._bar.update()

    def say(self, shard: _Shard) -> None:
        if not self._bar.disable:
            return
        rate = (self._now - self._before) / max(time.monotonic() - self._began, 1e-3)
        logging.info(
            "%s: %d of %d images, %.0f a second, %.1f minutes left",
            shard.file,
            self._now,
            self._total,
            rate,
            (self._total - self._now) / rate / 60,
        )
