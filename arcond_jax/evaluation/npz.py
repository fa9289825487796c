"""Files of named arrays that are either whole or absent, and that fail with one line.

Arrays larger than memory are written in pieces, and mapped where they are read.
"""

import contextlib
import dataclasses
import io
import math
import os
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from arcond_jax import atomic

HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
MAX_HEADER = 512  # bytes of dtype and shape: those of plain arrays take less than 128
# Real arrays shrink tenfold at best; what grows more than this, and to more than this, is no array.
MAX_INFLATION, INFLATED = 100, 2**28
HELD = 2**26  # bytes of an array that is read into memory; a larger one stays on the disk
PIECE = 2**22  # bytes that are looked at, at a time


@dataclasses.dataclass(frozen=True)
class InPieces:
    """An array to be written that is never whole in memory.

    Attributes:
      shape: Of the array.
      dtype: Of the array.
      pieces: Its rows, some at a time, in order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Iterable[np.ndarray]


def write(path: str | os.PathLike, arrays: Mapping[str, np.ndarray | InPieces]) -> None:
    """Writes an npz file, whole or not at all, under the very name `path`.

    It is what `numpy.savez` writes, the same bytes for the same arrays whenever it is written.

    Raises:
      OSError: In one line that names the file.
      ValueError: Pieces that do not make up their array.
    """
    with (
        atomic.file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=True) as opened:
                if isinstance(array, InPieces):
                    _write_pieces(opened, array, name)
                else:
                    np.lib.format.write_array(opened, np.asanyarray(array), allow_pickle=False)


def _write_pieces(file: Any, array: InPieces, name: str) -> None:
    descr = np.lib.format.dtype_to_descr(array.dtype)
    header = {"descr": descr, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, header)
    count = 0
    for piece in array.pieces:
        if piece.dtype != array.dtype or piece.shape[1:] != array.shape[1:]:
            raise ValueError(
                f"a piece of {name} is {piece.dtype} {list(piece.shape)}, the array {array.dtype} "
                f"{list(array.shape)}"
            )
        file.write(np.ascontiguousarray(piece).data)
        count += len(piece)
    if count != array.shape[0]:
        raise ValueError(f"the pieces of {name} have {count} rows, the array {array.shape[0]}")


def read(
    path: str | os.PathLike, *names: str | tuple[str, ...], what: str
) -> dict[str, np.ndarray]:
    """Reads the named arrays and nothing else of the file; they cannot be written to.

    Nothing is unpickled, and no memory is taken for an array before its size is known to be in the
    file. Of one larger than `HELD` only the checksum is looked at: it is mapped from the file, or,
    if it is compressed, from a temporary one (TMPDIR) that nobody else sees.

    Args:
      path: File to read.
      *names: Of the arrays. A tuple holds names of one array in turn, the first of which it is
        returned under: what earlier versions or other programs call it.
      what: The kind of file expected, for the error message, such as "samples file".

    Raises:
      FileNotFoundError: Nothing is there.
      OSError: The file cannot be opened.
      ValueError: Not an npz file, a damaged one, one without a wanted array, or with an array that
        is encrypted, holds objects, or is not what its header says; always in one line.
    """
    with _opened(path, what) as archive:
        held = _names(archive)
        asked = [(name,) if isinstance(name, str) else name for name in names]
        wanted = {each[0]: [name for name in each if name in held] for each in asked}
        missing = sorted(name for name, found in wanted.items() if not found)
        if missing:
            raise ValueError(f"{path} is not a {what}: it lacks {', '.join(missing)}.")
        arrays = {}
        for name, found in wanted.items():
            try:
                arrays[name] = _member(archive, f"{found[0]}.npy")
            except Exception as error:  # zlib and the parser of headers raise what they like
                raise ValueError(
                    f"{path} is not a whole {what}: {_line(error)} ({found[0]})."
                ) from None
        return arrays


def names_in(path: str | os.PathLike, *, what: str) -> frozenset[str]:
    """Names of the arrays of an npz file; errors as of `read`."""
    with _opened(path, what) as archive:
        return _names(archive)


@contextlib.contextmanager
def _opened(path: str | os.PathLike, what: str) -> Iterator[zipfile.ZipFile]:
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such {what}.")
    with path.open("rb") as file:
        # The directory of a zip file stands at its end, so a truncated file is not one either.
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is not a whole {what}: truncated, or of another kind.")
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # zipfile raises what it likes for damaged files
            raise ValueError(f"{path} is not a whole {what}: {_line(error)}.") from None
        yield archive


def _names(archive: zipfile.ZipFile) -> frozenset[str]:
    names = archive.namelist()
    return frozenset(name.removesuffix(".npy") for name in names if name.endswith(".npy"))


def whole_number(array: np.ndarray, *, where: str, at_least: int = 0) -> int:
    """The integer that an array of no axes holds.

    Raises:
      ValueError: It is something else, or below `at_least`; `where` names file and array.
    """
    if array.ndim or not np.issubdtype(array.dtype, np.integer) or array < at_least:
        raise ValueError(
            f"{where} must be one whole number of at least {at_least}, got {array.dtype} "
            f"{list(array.shape)}."
        )
    return int(array)


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array; raises whatever zipfile, zlib and numpy raise, and ValueError for a wrong size."""
    info = archive.getinfo(name)
    if info.compress_size > _file(archive).seek(0, os.SEEK_END):
        raise ValueError("its size is larger than the file")
    if info.file_size > max(INFLATED, MAX_INFLATION * info.compress_size):
        raise ValueError(f"{info.compress_size} bytes would inflate to {info.file_size}")
    with archive.open(info) as file:
        shape, fortran_order, dtype = _header(file, info)
        size = math.prod(shape) * dtype.itemsize
        order = "F" if fortran_order else "C"
        if size > HELD:
            place, offset = _on_disk(archive, info, file, size)
            array = np.memmap(place, dtype, "r", offset=offset, shape=shape, order=order)
            return array.astype(dtype.newbyteorder("="), copy=False)
        data = file.read(size + 1)  # one more, so that the checksum is looked at
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes instead of {size}")
    array = np.ndarray(shape, dtype, buffer=data, order=order)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _on_disk(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, member: Any, size: int
) -> tuple[IO[bytes], int]:
    """A file that holds the rest of a member as it is, and from where on; its checksum is right."""
    start = member.tell()
    # What is compressed, or in a bucket, cannot be mapped where it lies.
    stored = info.compress_type == zipfile.ZIP_STORED and isinstance(
        _file(archive), io.BufferedReader
    )
    place = _file(archive) if stored else tempfile.TemporaryFile()  # noqa: SIM115  # is mapped
    count = 0
    while data := member.read(PIECE):
        count += len(data)
        if not stored:
            place.write(data)
    if count != size:
        raise ValueError(f"{count} bytes instead of {size}")
    place.flush()
    return place, _start_of(archive, info) + start if stored else 0


def _start_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where in its file the data of a member begins, behind a header, a name and what else is said.

    Source: PKWARE, APPNOTE.TXT, 4.3.7.
    """
    file = _file(archive)
    file.seek(info.header_offset + 26)
    return info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


def _header(
    file: zipfile.ZipExtFile | IO[bytes], info: zipfile.ZipInfo
) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type that an array says it has, and has; the file is then at its numbers."""
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"format {version[0]}.{version[1]} is not read")
    with warnings.catch_warnings(action="ignore"):  # of odd literals in a header
        shape, fortran_order, dtype = HEADERS[version](file, max_header_size=MAX_HEADER)
    if dtype.hasobject:
        raise ValueError("Object arrays are pickled, which is not read")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size != info.file_size - file.tell():
        raise ValueError(f"its header says {dtype} {list(shape)}, which it does not hold")
    return shape, fortran_order, dtype


def _file(archive: zipfile.ZipFile) -> Any:
    assert archive.fp is not None  # it was not closed
    return archive.fp


def _line(error: Exception) -> str:
    """What an exception says, in one line, without its full stop."""
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
