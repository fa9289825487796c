"""Text that grows: in a file, or in an object of a bucket, which cannot and is written anew."""

import os
from typing import Protocol, runtime_checkable

from etils import epath

from arcond_jax import atomic


@runtime_checkable  # annotations are checked at run time in the tests
class Appended(Protocol):
    """What `opened` gives."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def opened(path: epath.PathLike) -> Appended:
    """A text file to append to, which is there already.

    In a bucket, where opening to append would replace what is there, `flush` writes everything.
    """
    path = epath.Path(path)
    return _Object(path) if "://" in os.fspath(path) else path.open("a")


class _Object:
    def __init__(self, path: epath.Path) -> None:
        self._path, self._text, self._is_written = path, path.read_text(), True

    def write(self, text: str, /) -> None:
        self._text += text
        self._is_written = False

    def flush(self) -> None:
        if not self._is_written:
            atomic.write_text(self._path, self._text)
            self._is_written = True

    def close(self) -> None:
        self.flush()
