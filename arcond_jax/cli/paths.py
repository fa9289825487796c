"""Paths as people type them: `~` is their home, and `gs://bucket/run` stays a bucket."""

import pathlib

from etils import epath


def folder(text: str) -> epath.Path:
    """A folder, on this machine or in a bucket."""
    return epath.Path(text).expanduser()


def file(text: str) -> pathlib.Path:
    """A file on this machine."""
    return pathlib.Path(text).expanduser()


def check_apart(**named: pathlib.Path | None) -> None:
    """Raises ValueError if two arguments, by name, are the same file: one would replace the other.

    Devices such as /dev/null may be given often.
    """
    seen: dict[pathlib.Path, str] = {}
    for name, path in named.items():
        if path is None or (path.exists() and not path.is_file()):
            continue
        other = seen.setdefault(path.resolve(), name)
        if other != name:
            raise ValueError(f"--{other} and --{name} are the same file, {path}: name two")
