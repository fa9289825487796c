"""Local copies of data in a bucket: ArrayRecord is read at random, which buckets are too slow for.

A copy is whole before it is read, since every batch touches every shard. It stays for the next run.
Buckets are read through etils and fsspec: `gs://` needs the package gcsfs, `s3://` s3fs.
"""

import concurrent.futures
import hashlib
import logging
import pathlib
import shutil
from collections.abc import Iterator

from etils import epath

from arcond_jax import atomic

NUM_THREADS = 8  # a bucket gives its bandwidth to several readers only
UNREAD = "progress"  # folder of what is known of shards while they are written
BLOCK_BYTES = 1 << 24  # read at a time
DESCRIPTION_BYTES = 1 << 20  # no more, and a file tells what the others are


def local(url: str, *, copies: pathlib.Path, max_bytes: int) -> pathlib.Path:
    """The local copy of a folder in a bucket, made if it is not there yet.

    Files that are there with their size are not copied again, unless what describes them (manifest,
    labels: files up to 1 MB) has changed.

    Args:
      copies: Holds the copies, a folder each.
      max_bytes: Of all files of this folder.

    Raises:
      ValueError: There is no such folder, it is larger than `max_bytes` or than the disk has room.
      ImportError: Its kind of bucket needs a package that is not installed.
      OSError: It cannot be read, or not be written here.
    """
    source = epath.Path(url)
    if not source.is_dir():
        raise ValueError(f"{url} does not exist")
    sizes = _sizes(source)
    total = sum(sizes.values())
    if total > max_bytes:
        raise ValueError(
            f"{url} holds {_gigabytes(total)}, more than the {_gigabytes(max_bytes)} of "
            "data.max_copy_gb: raise that, or copy the folder yourself"
        )
    name = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    target = copies / f"{source.name}-{name}"
    target.mkdir(parents=True, exist_ok=True)
    fresh = [name for name, size in sizes.items() if size <= DESCRIPTION_BYTES]
    content = {name: b"".join(_blocks(source / name)) for name in fresh}
    if any(_differs(target / name, content[name]) for name in fresh):
        shutil.rmtree(target)
        target.mkdir()
    missing = [name for name, size in sizes.items() if not _has_size(target / name, size)]
    needed = sum(sizes[name] for name in missing)
    if needed > shutil.disk_usage(target).free:
        raise ValueError(f"{target} has no room for the {_gigabytes(needed)} of {url}: free some")
    if missing:
        logging.info("copying %s of %s to %s", _gigabytes(needed), url, target)
    large = [name for name in missing if name not in content]
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        for copied in [pool.submit(_copy, source / name, target / name) for name in large]:
            copied.result()
    for name in fresh:  # last: where they are, the others are
        if name in missing:
            _write(target / name, content[name])
    return target


def _sizes(folder: epath.Path, below: str = "") -> dict[str, int]:
    """Bytes of every file at any depth, by its path; but not what only writers read."""
    sizes = {}
    for entry in sorted(folder.iterdir()):
        name = f"{below}{entry.name}"
        if not entry.is_dir():
            sizes[name] = entry.stat().length
        elif name != UNREAD:
            sizes |= _sizes(entry, f"{name}/")
    return sizes


def _differs(path: pathlib.Path, content: bytes) -> bool:
    """Whether an earlier copy had something else there; none had nothing."""
    return path.is_file() and path.read_bytes() != content


def _has_size(path: pathlib.Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _copy(source: epath.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic.file(target) as written:
        for block in _blocks(source):
            written.write(block)


def _blocks(source: epath.Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                yield block
    except OSError as error:
        raise atomic.ReadError(f"{source} cannot be read: {error.strerror or error}") from error


def _write(path: pathlib.Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.file(path) as written:
        written.write(content)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
