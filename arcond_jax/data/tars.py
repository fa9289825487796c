"""Listings of tar files: ILSVRC's as they are downloaded, and shards of WebDataset.

Nothing is unpacked: an image is read from where it lies in its file.
"""

import contextlib
import json
import pathlib
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from arcond_jax.data import folder
from arcond_jax.data.listing import VALIDATION, Listing, by_split, validation_labels

SYNSET = re.compile(r"n\d{8}")
MAX_LABEL_BYTES = 1 << 20  # of a file that says a label


class _Member(NamedTuple):
    """An image in a tar file."""

    name: str
    tar: int  # index into the paths
    offset: int
    size: int


def find(paths: list[pathlib.Path], root: pathlib.Path) -> dict[str, Listing]:
    """Splits of tar files, told by what is in the first of their members.

    Raises:
      ValueError: One is compressed, cut off, or has no labels.
    """
    kinds: dict[str, list[pathlib.Path]] = {}
    for path in sorted(paths):
        kinds.setdefault(_kind(path), []).append(path)
    found = {}
    if "train" in kinds:
        found["train"] = _of_class_tars(kinds["train"])
    if "validation" in kinds:
        found["held_out"] = _of_validation(kinds["validation"])
    for split, shards in by_split(kinds.get("webdataset", ()), root).items():
        found.setdefault(split, _of_webdataset(shards))
    return found


def _kind(path: pathlib.Path) -> str:
    with _opened(path) as (_, tar):
        first = next((member.name for member in tar if member.isfile()), None)
    if first is None:
        raise ValueError(f"{path} is empty: remove it")
    name = pathlib.PurePosixPath(first).name
    if VALIDATION.fullmatch(name):
        return "validation"
    if name.endswith(".tar") or SYNSET.fullmatch(path.stem):
        return "train"
    return "webdataset"


def _of_class_tars(paths: list[pathlib.Path]) -> Listing:
    """A tar file of tar files, or these, each of a class."""
    classes: dict[str, list[_Member]] = {}
    for number, path in enumerate(paths):
        with _opened(path) as (file, tar):
            if SYNSET.fullmatch(path.stem):
                classes.setdefault(path.stem, []).extend(_images(tar, number))
                continue
            for member in tar:
                if not member.isfile():
                    continue
                name = pathlib.PurePosixPath(member.name)
                if name.suffix != ".tar":
                    raise ValueError(f"{path} holds {member.name} beside tar files: remove it")
                file.seek(member.offset_data)
                with _members(path, file) as inner:
                    classes.setdefault(name.stem, []).extend(_images(inner, number))
    names = tuple(sorted(classes))
    empty = [name for name in names if not classes[name]]
    if empty:
        raise ValueError(f"{paths[0]} has the class {empty[0]!r} without images: it is not whole")
    members = [member for name in names for member in sorted(classes[name])]
    label = np.repeat(np.arange(len(names)), [len(classes[name]) for name in names])
    return _listing("tar files of classes", paths, members, label, names)


def _of_validation(paths: list[pathlib.Path]) -> Listing:
    members = []
    for number, path in enumerate(paths):
        with _opened(path) as (_, tar):
            members.extend(_images(tar, number))
    members.sort()
    label, names = validation_labels(pathlib.PurePosixPath(x.name).name for x in members)
    return _listing("tar file of validation images", paths, members, label, names)


def _of_webdataset(paths: list[pathlib.Path]) -> Listing:
    members, said = [], []
    for number, path in enumerate(paths):
        samples: dict[str, dict[str, Any]] = {}
        with _opened(path) as (file, tar):
            for member in tar:
                if not member.isfile() or pathlib.PurePosixPath(member.name).name[0] == ".":
                    continue
                key, _, ending = _key_and_ending(member.name)
                sample = samples.setdefault(key, {})
                if folder.is_image(f"x.{ending}"):
                    sample["image"] = _Member(member.name, number, member.offset_data, member.size)
                elif ending in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
                    file.seek(member.offset_data)
                    sample[ending] = file.read(member.size)
        for key, sample in samples.items():
            if "image" in sample:
                members.append(sample["image"])
                said.append(_label(path, key, sample))
    if not members:
        raise ValueError(f"{paths[0]} has no images as {', '.join(folder.EXTENSIONS)}")
    label, names = classes_of(said)
    return _listing("WebDataset", paths, members, label, names)


def classes_of(said: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and class names of what samples say: ids as they are, or names, sorted."""
    if all(text.isdecimal() for text in said):
        label = np.asarray([int(text) for text in said], np.int32)
        return label, tuple(str(i) for i in range(int(label.max()) + 1))
    names, label = np.unique(np.asarray(said), return_inverse=True)
    return label.astype(np.int32), tuple(str(name) for name in names)


def _key_and_ending(name: str) -> tuple[str, str, str]:
    """`dir/key` and `ending` of dir/key.ending: a key goes to the first point of the file name."""
    parent, slash, file = name.rpartition("/")
    key, point, ending = file.partition(".")
    return f"{parent}{slash}{key}", point, ending.lower()


def _label(path: pathlib.Path, key: str, sample: dict[str, Any]) -> str:
    if "cls" in sample:
        return sample["cls"].decode("utf-8", "replace").strip()
    try:
        return str(json.loads(sample["json"])["label"])
    except (KeyError, ValueError, TypeError):
        raise ValueError(
            f"{path} holds images without labels: {key} has no .cls, and no .json with a label"
        ) from None


def _images(tar: tarfile.TarFile, number: int) -> Iterator[_Member]:
    for member in tar:
        name = pathlib.PurePosixPath(member.name).name
        if member.isfile() and folder.is_image(name) and name[0] != ".":
            yield _Member(member.name, number, member.offset_data, member.size)


def _listing(
    kind: str,
    paths: list[pathlib.Path],
    members: list[_Member],
    label: np.ndarray,
    names: tuple[str, ...],
) -> Listing:
    tars = np.asarray([member.tar for member in members], np.int32)
    offsets = np.asarray([member.offset for member in members], np.int64)
    sizes = np.asarray([member.size for member in members], np.int64)

    def read(index: int) -> bytes:
        with open(paths[tars[index]], "rb") as opened:
            opened.seek(offsets[index])
            return opened.read(sizes[index])

    return Listing(
        kind=kind,
        names=[member.name for member in members],
        label=label.astype(np.int32),
        size=sizes,
        class_names=names,
        read=read,
    )


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[tuple[IO[bytes], tarfile.TarFile]]:
    with open(path, "rb") as file, _members(path, file) as tar:
        yield file, tar


@contextlib.contextmanager
def _members(path: pathlib.Path, file: IO[bytes]) -> Iterator[tarfile.TarFile]:
    """The tar file that begins where `file` stands."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} cannot be read as a tar file ({error}): it is compressed, or cut off"
        ) from None
