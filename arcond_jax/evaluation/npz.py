"""Files of named arrays that are either whole or absent, and that fail with one line."""

import math
import os
import warnings
import zipfile
from collections.abc import Mapping

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


def write(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an npz file, whole or not at all, under the very name `path`."""
    with atomic.file(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read(
    path: str | os.PathLike, *names: str | tuple[str, ...], what: str
) -> dict[str, np.ndarray]:
    """Reads the named arrays and nothing else of the file; they cannot be written to.

    Nothing is unpickled, and no memory is taken for an array before its size is known to be in the
    file.

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
        held = set(archive.namelist())
        asked = [(name,) if isinstance(name, str) else name for name in names]
        wanted = {each[0]: [name for name in each if f"{name}.npy" in held] for each in asked}
        missing = sorted(name for name, found in wanted.items() if not found)
        if missing:
            raise ValueError(f"{path} is not a {what}: it lacks {', '.join(missing)}.")
        arrays = {}
        for name, found in wanted.items():
            try:
                arrays[name] = _member(archive, f"{found[0]}.npy")
            except Exception as error:  # so do zlib and the parser of headers
                raise ValueError(
                    f"{path} is not a whole {what}: {_line(error)} ({found[0]})."
                ) from None
        return arrays


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
    assert archive.fp is not None  # it was not closed
    if info.compress_size > archive.fp.seek(0, os.SEEK_END):
        raise ValueError("its size is larger than the file")
    if info.file_size > max(INFLATED, MAX_INFLATION * info.compress_size):
        raise ValueError(f"{info.compress_size} bytes would inflate to {info.file_size}")
    with archive.open(info) as file:
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
        data = file.read(size + 1)  # one more, so that the checksum is looked at
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes instead of {size}")
    array = np.ndarray(shape, dtype, buffer=data, order="F" if fortran_order else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def _line(error: Exception) -> str:
    """What an exception says, in one line, without its full stop."""
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
