"""Paths as people type them: `~` is their home, and `gs://bucket/run` stays a bucket."""

import argparse
import pathlib

from etils import epath


def folder(text: str) -> epath.Path:
    """A folder, on this machine or in a bucket."""
    return epath.Path(text).expanduser()


def place(text: str) -> epath.Path:
    """A file, on this machine or in a bucket."""
    return epath.Path(text).expanduser()


def file(text: str) -> pathlib.Path:
    """A file or folder on this machine.

    Raises:
      argparse.ArgumentTypeError: It lies in a bucket.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} lies in a bucket: name one on this machine")
    return pathlib.Path(text).expanduser()


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
