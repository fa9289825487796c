"""Files and folders that appear whole or not at all: written beside their place, then renamed.

What is being written is known here, so that a program that must end at once can remove it.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO

from etils import epath

UMASK = os.umask(0)  # for the rights of any new file; those of tempfile are private to the writer
os.umask(UMASK)
_unfinished: set[pathlib.Path] = set()


class ReadError(OSError):
    """Of what is read to be written elsewhere, in one line that names it."""


@contextlib.contextmanager
def unfinished(path: epath.PathLike) -> Iterator[None]:
    """What lies at `path` when the block ends is removed, or earlier by `abandon`; not in buckets.

    For the temporary name of a file or folder, which has another by then if all went well.
    """
    if _in_bucket(path):
        yield
        return
    known = pathlib.Path(path)
    _unfinished.add(known)
    try:
        yield
    finally:
        _remove(known)
        _unfinished.discard(known)


def abandon() -> None:
    """Removes everything unfinished; for a program that ends without leaving its blocks."""
    for path in tuple(_unfinished):
        _remove(path)


def remove(path: epath.PathLike) -> None:
    """Removes a file or folder if it is there, and says nothing if it cannot; not in buckets."""
    if not _in_bucket(path):
        _remove(pathlib.Path(path))


def _remove(path: pathlib.Path) -> None:
    for _ in range(10 if path.is_dir() else 0):  # another thread may still be filling it
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def check(path: epath.PathLike) -> None:
    """Asks, before long work, whether a file can be written to `path`; writes nothing.

    Raises:
      OSError: Its folder is missing or cannot be written to, or `path` itself is a folder.
    """
    if _in_bucket(path) or is_special(path):
        return
    place = pathlib.Path(path).resolve()
    parent = place.parent
    if not parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} does not exist: create it first")
    if place.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: no writing in its folder is allowed")


@contextlib.contextmanager
def named(path: epath.PathLike) -> Iterator[None]:
    """An OSError of the block becomes one line that names `path`; a `ReadError` stays as it is."""
    try:
        yield
    except ReadError:
        raise
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def file(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Opens a file to write bytes to; it is at `path` once the block has ended without an error.

    A link is followed, and its target replaced. What is no regular file, as /dev/stdout, and
    objects in buckets, which appear whole anyway, are written in place.

    Raises:
      OSError: In one line that names `path`; a `ReadError` of the block stays as it is.
    """
    with named(path):
        if _in_bucket(path):
            with epath.Path(path).open("wb") as opened:
                yield opened
            return
        if os.path.isdir(path) or is_special(path):
            with open(path, "wb") as opened:
                yield opened
            return
        target = pathlib.Path(path).resolve()
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=_prefix(target))
        with unfinished(temporary):
            with os.fdopen(descriptor, "wb") as opened:
                yield opened
            os.chmod(temporary, 0o666 & ~UMASK)
            os.replace(temporary, target)


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a text file in UTF-8; raises OSError in one line that names it."""
    with file(path) as opened:
        opened.write(text.encode())


@contextlib.contextmanager
def folder(path: epath.PathLike) -> Iterator[pathlib.Path]:
    """Gives a folder to fill; it is at `path` once the block has ended without an error.

    Folders above it are made.

    Raises:
      OSError: In one line that names `path`; there already is something but an empty folder.
    """
    target = pathlib.Path(path).resolve()
    with named(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=target.parent, prefix=_prefix(target)))
        with unfinished(temporary):
            yield temporary
            temporary.chmod(0o777 & ~UMASK)
            temporary.rename(target)


def _in_bucket(path: epath.PathLike) -> bool:
    return "://" in os.fspath(path)


def is_special(path: epath.PathLike) -> bool:
    """A pipe, a terminal, a device."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def _prefix(target: pathlib.Path) -> str:
    return f".{target.name[:100]}."  # a name may be as long as the file system allows
