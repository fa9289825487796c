"""Prepared images: a manifest and shards of ArrayRecord, read in any order from a few large files.

A folder that `arcond prepare` wrote holds

    manifest.json                        what is in it, and whether it is complete
    train-00000-of-00275.array_record    shards of each split: train, held_out
    train.labels.npy                     int32, of every record of a split

The record of an image is its label (int32), the length of its name in bytes (uint16), both with the
low byte first, its name (UTF-8), and the JPEG, PNG or WebP file as it was.
"""

import collections
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  # no stubs
from jaxtyping import Int32

from arcond_jax import atomic
from arcond_jax.data import images

FORMAT = 1  # of the manifest and the records
MANIFEST = "manifest.json"
WRITERS = {"images": "arcond prepare", "tokens": "arcond encode"}  # by kind of content
OTHERWISE = {  # where there is content of the other kind
    "images": "read it by data.name=cache",
    "tokens": "encode it by `arcond encode`, or read it by data.name=records",
}
WRITER_OPTIONS = "group_size:1,uncompressed"  # any record in one read; JPEG does not shrink
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
MAX_OPEN = 128  # files; many systems allow a process 256
PACKAGES = ("arcond_jax", "array_record", "jax", "pillow")
_HEADER = struct.Struct("<iH")


def again(kind: str) -> str:
    """What to do where content of a kind is unfinished or damaged."""
    return f"run the same `{WRITERS[kind]}` again"


def pack(label: int, name: str, encoded: bytes) -> bytes:
    """The record of an image; a name is cut to its last 64 KiB."""
    name_bytes = name.encode("utf-8", "replace")[-0xFFFF:]
    return _HEADER.pack(label, len(name_bytes)) + name_bytes + encoded


def unpack(record: bytes) -> tuple[int, str, bytes]:
    """Label, name and encoded image of a record."""
    label, length = _HEADER.unpack_from(record)
    start = _HEADER.size + length
    return label, record[_HEADER.size : start].decode("utf-8", "replace"), record[start:]


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> int:
    """Writes a shard, which is at `path` once it is whole and on the disk; returns its records.

    What an earlier attempt left half-written is removed. A writer that is killed leaves a file that
    opens as an empty one, hence the temporary name.
    """
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        with atomic.unfinished(temporary):
            writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
            try:
                for record in records:
                    writer.write(record)
                    count += 1
            finally:
                writer.close()
            written = array_record_module.ArrayRecordReader(str(temporary)).num_records()
            if written != count:
                raise OSError(f"{path} cannot be written: {written} of {count} records arrived")
            _sync(temporary)
            temporary.rename(path)
            _sync(path.parent)
    except RuntimeError as error:  # of ArrayRecord, such as a full disk
        raise OSError(f"{path} cannot be written: {' '.join(str(error).split())}") from error
    return count


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Shards:
    """Random access to the records of several files; may be read from several threads.

    A file is opened when it is first read, and at most `MAX_OPEN` stay open.

    Args:
      paths: Of the files.
      counts: Records of each.
      kind: Of their content.
    """

    def __init__(self, paths: Sequence[pathlib.Path], counts: Sequence[int], kind: str = "images"):
        self._paths, self._counts, self._kind = tuple(paths), tuple(counts), kind
        self._starts = np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int64)
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> bytes:
        """Raises ValueError, naming the file, where it is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = int(index - self._starts[shard])
        try:
            # By a range: a list of rows costs as much more as there are records in the file.
            return self._reader(shard).read(row, row + 1)[0]
        except (RuntimeError, IndexError) as error:
            text = " ".join(str(error).split())[:100]
            raise ValueError(
                f"{self._paths[shard]} is damaged at record {row} ({text}): remove it, and "
                f"{again(self._kind)}"
            ) from None

    def _reader(self, shard: int) -> Any:
        with self._lock:
            reader = self._open.pop(shard, None)
            if reader is None:
                path = str(self._paths[shard])
                reader = array_record_module.ArrayRecordReader(path, READER_OPTIONS)
                if reader.num_records() != self._counts[shard]:
                    raise RuntimeError(
                        f"{reader.num_records()} records, expected {self._counts[shard]}"
                    )
                if len(self._open) >= MAX_OPEN:
                    self._open.popitem(last=False)  # closes when its last read has ended
            self._open[shard] = reader
            return reader


def is_prepared(folder: pathlib.Path) -> bool:
    """Whether a folder was written by `arcond prepare` or `arcond encode`, to its end or not."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: pathlib.Path, *, kind: str = "images") -> dict[str, Any]:
    """The manifest, complete or not; raises ValueError if it is missing or none of this format."""
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: name a folder that `{WRITERS[kind]}` wrote")
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST}: name a folder that `{WRITERS[kind]}` wrote, or make one "
            f"by `{WRITERS[kind]} --source {folder} --out OUT`"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and {again(kind)}") from None
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version}, this version reads {FORMAT}: make it anew by "
            f"`{WRITERS[kind]}`"
        )
    return manifest


def complete_manifest(folder: pathlib.Path, *, kind: str) -> dict[str, Any]:
    """The manifest of a folder to train on; raises ValueError if it is unfinished, or no `kind`."""
    manifest = read_manifest(folder, kind=kind)
    if manifest["kind"] != kind:
        raise ValueError(f"{folder} holds {manifest['kind']}, not {kind}: {OTHERWISE[kind]}")
    if not manifest["complete"]:
        raise ValueError(
            f"{folder} is not finished: {again(kind)}, and it goes on where it stopped"
        )
    return manifest


def write_manifest(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes it whole or not at all, with the versions of what wrote it."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    text = json.dumps({"format": FORMAT, **manifest, "versions": versions}, indent=1)
    atomic.write_text(folder / MANIFEST, text + "\n")


def write_labels(folder: pathlib.Path, split: str, label: Int32[np.ndarray, " n"]) -> str:
    """Writes the labels of a split; returns the SHA-256 of their file."""
    content = io.BytesIO()
    np.save(content, label)
    with atomic.file(folder / f"{split}.labels.npy") as opened:
        opened.write(content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def open_split(
    folder: pathlib.Path, manifest: dict[str, Any], split: str
) -> tuple[Int32[np.ndarray, " n"], Shards]:
    """Labels and records of a split.

    Raises:
      ValueError: There is no such split, or a file of it is missing or cut off.
    """
    kind, splits = manifest["kind"], manifest["splits"]
    if split not in splits:
        how = "prepare it with --held_out 0.05, or from a source that has one"
        hint = f": {how}" if kind == "images" else ""
        raise ValueError(f"{folder} has no split {split}, only {', '.join(splits)}{hint}")
    shards = splits[split]["shards"]
    for shard in shards:
        _check_size(folder / shard["file"], shard["bytes"], kind)
    label = _read_labels(folder, split, splits[split]["labels_sha256"], kind)
    paths, counts = [folder / x["file"] for x in shards], [x["records"] for x in shards]
    return label, Shards(paths, counts, kind)


def _read_labels(
    folder: pathlib.Path, split: str, sha256: str, kind: str
) -> Int32[np.ndarray, " n"]:
    path = folder / f"{split}.labels.npy"
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is {'damaged' if content else 'missing'}: {again(kind)}")
    return np.load(io.BytesIO(content))


class Records:
    """Random access to a prepared split; items and attributes are those of `ImageFolder`.

    Args:
      directory: What `arcond prepare` wrote.
      split: "train" or "held_out".
      image_size: Pixels on a side.
      resize: One of `images.RESIZES`.

    Raises:
      ValueError: The folder is unfinished, a file of it is missing or cut off, it has no such
        split, or holds crops that are too small; and for an item, a damaged file, named.
    """

    image_dtype = np.dtype(np.uint8)

    def __init__(
        self,
        directory: str | os.PathLike,
        split: str = "train",
        *,
        image_size: int,
        resize: str = "adm",
    ):
        root = pathlib.Path(directory)
        manifest = complete_manifest(root, kind="images")
        stored = manifest["image_size"]
        if stored is not None and image_size > stored:
            raise ValueError(
                f"{root} holds crops of {stored} pixels, data.image_size is {image_size}: prepare "
                f"it with --resize {image_size} or without --resize"
            )
        self.label, self._shards = open_split(root, manifest, split)
        self.label_names = tuple(manifest["class_names"])
        self.num_classes = len(self.label_names)
        self.image_shape: tuple[int, int, int] = (image_size, image_size, 3)
        self.resize = resize

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        label, name, encoded = unpack(self._shards[index])
        if label != self.label[index]:
            raise ValueError(f"{name} has label {label}, the labels say {self.label[index]}")
        image = images.open_square(
            name, self.image_shape[0], num_channels=3, resize=self.resize, encoded=encoded
        )
        return {"image": image, "label": self.label[index]}


def _check_size(path: pathlib.Path, size: int, kind: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: {again(kind)}")
    if path.stat().st_size != size:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, the manifest says {size}: remove it, and "
            f"{again(kind)}"
        )
