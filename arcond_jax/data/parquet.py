"""Listings of parquet files with columns of encoded images and labels, as Hugging Face writes them.

The only door to pyarrow, an extra.
"""

import collections
import json
import pathlib
import threading
from typing import Any

import numpy as np

from arcond_jax.data.listing import Listing, by_split

IMAGES = ("image", "img", "jpg", "png")  # names of columns
LABELS = ("label", "labels", "cls", "fine_label")
MAX_GROUPS = 4  # row groups kept in memory


def find(paths: list[pathlib.Path], root: pathlib.Path) -> dict[str, Listing]:
    """Splits of parquet files, by their names.

    Raises:
      ImportError: pyarrow is not installed.
      ValueError: A file cannot be read, or has no labels.
    """
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("parquet files need pyarrow: pip install 'arcond_jax[parquet]'") from None
    found = {}
    for split, files in by_split(paths, root).items():
        try:
            found[split] = _split(files)
        except pyarrow.ArrowException as error:
            text = " ".join(str(error).split())
            raise ValueError(f"{files[0].parent}: a parquet file is damaged ({text})") from None
    return found


def _split(paths: list[pathlib.Path]) -> Listing:
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    names, labels, sizes, groups = [], [], [], []
    class_names: tuple[str, ...] = ()
    image = ""
    for number, path in enumerate(paths):
        file = pyarrow.parquet.ParquetFile(path)
        image, inner, label = _columns(path, file.schema_arrow)
        class_names = class_names or _class_names(file.schema_arrow, label)
        for group in range(file.num_row_groups):
            wanted = [label] + ([f"{image}.path"] if inner else [])
            table = file.read_row_group(group, columns=wanted)
            said = table[label].to_pylist()
            if None in said or min(said, default=0) < 0:
                raise ValueError(f"{path} holds images without labels")
            places = table[image].to_pylist() if inner else []
            places = [(place or {}).get("path") for place in places] or [None] * len(said)
            names += [place or f"{path.name}:{group}:{row}" for row, place in enumerate(places)]
            labels += said
            groups += [(number, group, row) for row in range(len(said))]
            sizes += [_mean_bytes(file.metadata.row_group(group), image)] * len(said)
    if not labels:
        raise ValueError(f"{paths[0]} has no images")
    if not class_names:
        class_names = tuple(str(i) for i in range(max(labels) + 1))
    return Listing(
        kind="parquet",
        names=names,
        label=np.asarray(labels, np.int32),
        size=np.asarray(sizes, np.int64),
        class_names=class_names,
        read=_Reader(paths, groups, image),
    )


def _columns(path: pathlib.Path, schema: Any) -> tuple[str, bool, str]:
    """Name of the column of images, whether it holds paths beside bytes, and that of labels."""
    image = next((name for name in IMAGES if name in schema.names), None)
    label = next((name for name in LABELS if name in schema.names), None)
    if image is None:
        raise ValueError(f"{path} has no column {' or '.join(IMAGES)}, only {schema.names}")
    if label is None:
        raise ValueError(f"{path} holds images without labels: no column {' or '.join(LABELS)}")
    kind = schema.field(image).type
    fields = [kind.field(i).name for i in range(kind.num_fields)]
    if fields and "bytes" not in fields:
        raise ValueError(f"{path} has no image bytes in column {image}, only {fields}")
    return image, "path" in fields, label


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """What Hugging Face's datasets keep beside the columns; empty if they do not."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(described["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _mean_bytes(group: Any, image: str) -> int:
    """Bytes of an image, the mean of a row group."""
    columns = [group.column(i) for i in range(group.num_columns)]
    total = sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema in (image, f"{image}.bytes")
    )
    return total // max(group.num_rows, 1)


class _Reader:
    """Gives the encoded bytes of an image; keeps the last few row groups."""

    def __init__(self, paths: list[pathlib.Path], groups: list[tuple[int, int, int]], image: str):
        self._paths, self._image = paths, image
        self._places = np.asarray(groups, np.int32)
        self._kept: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, index: int) -> bytes:
        number, group, row = self._places[index].tolist()
        with self._lock:
            if (number, group) not in self._kept:
                self._kept[number, group] = self._load(number, group)
                if len(self._kept) > MAX_GROUPS:
                    self._kept.popitem(last=False)
            column = self._kept[number, group]
        encoded = column[row].as_py()
        if not encoded:
            raise ValueError("no bytes")
        return encoded

    def _load(self, number: int, group: int) -> Any:
        import pyarrow.compute  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]

        file = pyarrow.parquet.ParquetFile(self._paths[number])
        kind = file.schema_arrow.field(self._image).type
        wanted = f"{self._image}.bytes" if kind.num_fields else self._image
        column = file.read_row_group(group, columns=[wanted])[self._image].combine_chunks()
        return pyarrow.compute.struct_field(column, "bytes") if kind.num_fields else column
