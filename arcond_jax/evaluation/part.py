"""Images that are there already of a file of samples that is not, in a folder beside it.

Every batch is a file of its own that is whole or absent, so what a killed program leaves is what it
would have gone on with. The settings that the images follow from lie with them.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from arcond_jax import atomic, caches, digest

SETTINGS, UNFINISHED = "settings.json", "unfinished"
MISSING = "nothing"


def path_of(path: str | os.PathLike) -> pathlib.Path:
    """Where the part of a file or folder lies: beside it, or beside what a link leads to.

    Of one in a bucket it lies in the user's caches.
    """
    if "://" in str(path):
        return caches.folder("samples") / f"{digest.of_json(str(path))[:16]}.part"
    target = pathlib.Path(path).resolve()
    return target.with_name(f"{target.name}.part")


class Part:
    """The first images of a file of samples, in batches of any sizes."""

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]) -> None:
        """Looks at what is there; nothing is written before `add`.

        Args:
          path: The folder, there or not.
          settings: All that the images follow from, by name, as JSON has it.

        Raises:
          ValueError: It holds images of other settings, or something else.
        """
        self.path, self._settings = path, json.loads(json.dumps(settings))
        self._starts: list[int] = []
        self.num_rows = 0
        if not path.exists():
            return
        if not path.is_dir() or not all(_is_ours(x.name) for x in path.iterdir()):
            raise ValueError(f"{path} is in the way of unfinished samples: move it elsewhere")
        self._look()
        if self.num_rows:
            self._check(_read(path / SETTINGS))

    def _look(self) -> None:
        while (length := _length(self._file(self.num_rows))) is not None:
            self._starts.append(self.num_rows)
            self.num_rows += length

    def _check(self, before: Mapping[str, Any]) -> None:
        before, now = _flat(before), _flat(self._settings)
        for name in sorted(before.keys() | now.keys()):
            was, wanted = (x.get(name, MISSING) for x in (before, now))
            if was != wanted:
                raise ValueError(
                    f"{self.path} holds {self.num_rows} images of an unfinished run whose {name} "
                    f"is {was!s:.60}, here it is {wanted!s:.60}: go on with that, remove the "
                    "folder, or name another file"
                )

    @property
    def batch_size(self) -> int | None:
        """Images of the first batch; None where there is none."""
        return None if not self._starts else [*self._starts[1:], self.num_rows][0]

    def add(self, image_uint8: UInt8[np.ndarray, "n height width channels"]) -> None:
        """Keeps a batch behind those that are there; it survives the end of the machine, too.

        Raises:
          OSError: It cannot be written; in one line that names the folder.
        """
        try:
            if not self._starts:
                self._begin()
            with open(self.path / UNFINISHED, "wb") as file:
                np.save(file, image_uint8)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.path / UNFINISHED, self._file(self.num_rows))
        except OSError as error:
            with contextlib.suppress(OSError):
                (self.path / UNFINISHED).unlink(missing_ok=True)
            why = error.strerror or error
            raise OSError(f"{self.path} cannot be written: {why}") from error
        self._starts.append(self.num_rows)
        self.num_rows += len(image_uint8)

    def _begin(self) -> None:
        """Whatever is there is of other settings, or damaged."""
        self.remove()
        self.path.mkdir(parents=True)
        atomic.write_text(self.path / SETTINGS, json.dumps(self._settings, indent=2) + "\n")

    def batches(self) -> Iterator[UInt8[np.ndarray, "n height width channels"]]:
        """The images in order, one batch in memory at a time."""
        for start in self._starts:
            yield np.load(self._file(start))

    def remove(self) -> None:
        """Removes the folder; what is left of it, if it cannot be, holds no image."""
        self._file(0).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, start: int) -> pathlib.Path:
        return self.path / f"{start:09d}.npy"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings within settings by their own names."""
    found = {}
    for name, value in settings.items():
        found |= _flat(value) if isinstance(value, dict) else {name: value}
    return found


def _is_ours(name: str) -> bool:
    batch = name.endswith(".npy") and name[:-4].isdigit()
    return batch or name in (SETTINGS, UNFINISHED) or name.startswith(f".{SETTINGS}.")


def _length(path: pathlib.Path) -> int | None:
    """Images in a batch; None if it is missing or damaged."""
    try:
        array = np.load(path, mmap_mode="r")
        return len(array) if array.dtype == np.uint8 and array.ndim == 4 and len(array) else None
    except (OSError, ValueError, EOFError):
        return None


def _read(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
