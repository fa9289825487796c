"""Paths as people type them: `~` is their home, and `gs://bucket/run` stays a bucket."""

import pathlib

from etils import epath


def folder(text: str) -> epath.Path:
    """A folder, on this machine or in a bucket."""
    return epath.Path(text).expanduser()


def file(text: str) -> pathlib.Path:
    """A file on this machine."""
    return pathlib.Path(text).expanduser()
