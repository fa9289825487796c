"""Paths as people type them: `~` is their home, and `gs://bucket/run` stays a bucket."""

import argparse
import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath


def folder(text: str) -> epath.Path:
    """A folder, on this machine or in a bucket.

    Raises:
      argparse.ArgumentTypeError: It is an address of another kind.
    """
    try:
        return epath.Path(text).expanduser()
    except KeyError:  # of etils
        raise argparse.ArgumentTypeError(
            f"{text} is no place known here: name one on this machine, or gs://..."
        ) from None


def place(text: str) -> epath.Path:
    """A file, on this machine or in a bucket; errors as of `folder`."""
    return folder(text)


def file(text: str) -> pathlib.Path:
    """A file or folder on this machine.

    Raises:
      argparse.ArgumentTypeError: It lies in a bucket.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} lies in a bucket: name one on this machine")
    return pathlib.Path(text).expanduser()


@contextlib.contextmanager
def local(path: epath.Path) -> Iterator[pathlib.Path]:
    """A path that is read on this machine; a file in a bucket is copied, and the copy removed.

    Raises:
      ValueError: It is in a bucket, and no file there.
    """
    if "://" not in str(path):
        yield pathlib.Path(path)
        return
    if path.is_dir() or not path.exists():
        raise ValueError(f"{path} is no file: give that of the weights, or copy the folder here")
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / path.name
        with path.open("rb") as there, copy.open("wb") as here:
            shutil.copyfileobj(there, here)
        yield copy


def check_apart(**named: epath.PathLike | None) -> None:
    """Raises ValueError if two arguments, by name, are the same file: one would replace the other.

    Devices such as /dev/null may be given often.
    """
    seen: dict[epath.Path, str] = {}
    for name, given in named.items():
        path = None if given is None else epath.Path(given)
        if path is None or (path.exists() and not path.is_file()):
            continue
        whole = path if "://" in str(path) else epath.Path(pathlib.Path(path).resolve())
        other = seen.setdefault(whole, name)
        if other != name:
            raise ValueError(f"--{other} and --{name} are the same file, {path}: name two")
