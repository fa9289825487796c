"""Files of named arrays that are either whole or absent, and that fail with one line."""

import os
import pathlib
import tempfile
import zipfile
from collections.abc import Mapping

import numpy as np


def write(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a temporary file beside `path` and renames it, so that no reader meets half a file.

    The suffix of `path` is kept as it is.
    """
    path = pathlib.Path(path)
    # Readable like any new file; mkstemp alone would make it private to its writer.
    umask = os.umask(0)
    os.umask(umask)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: str | os.PathLike, *, what: str) -> dict[str, np.ndarray]:
    """Reads every array of the file; pickled objects are refused.

    Args:
      path: File to read.
      what: The kind of file expected, for the error message, such as "samples file".

    Raises:
      FileNotFoundError: Nothing is there.
      ValueError: Not an npz file, a truncated one, or one that holds pickled objects.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such {what}.")
    # Tested first because numpy leaves the file open when it is not one. The directory of a zip
    # file stands at its end, so a truncated file is not one either.
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a whole {what}: truncated, or of another kind.")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path} is not a whole {what}: {error}.") from None
