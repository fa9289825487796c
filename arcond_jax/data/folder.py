"""A folder of image files, one subfolder a class, as ImageNet is usually unpacked.

`directory/<split>/<class>/<file>`, at any depth below the class, as torchvision's `ImageFolder`
takes it; classes and files in the order of their names. Hidden files and folders (".name") are
passed over; other files are counted, and the log says so.
"""

import functools
import logging
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from arcond_jax.data import images

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")  # in either case
SPLITS = {"train": ("train",), "held_out": ("val", "validation", "held_out", "test")}


class NoSplitError(ValueError):
    """A directory has no folder of a split."""


class ImageFolder:
    """Random access to one split; an item is `{"image": uint8 [size, size, 3], "label": int32}`.

    Images are made RGB by the rules of `images.open_image`, cropped and scaled. EXIF is not looked
    at: torchvision, which the published models were trained with, does not turn images either.

    Args:
      directory: Holds the folders of the splits.
      split: "train", or "held_out" for the first of val, validation, held_out and test that exists.
      image_size: Pixels on a side.
      resize: One of `images.RESIZES`.

    Attributes:
      label_names: Names of the class folders of the train split, sorted; a label is an index into
        them, in every split. Without a train split, those of the split itself.

    Raises:
      ValueError: No such split, no images in it or in a class of it, or held-out images of a class
        that the train split does not have; and for an item, a file that cannot be read.
    """

    image_dtype = np.dtype(np.uint8)

    def __init__(
        self,
        directory: str | os.PathLike,
        split: str = "train",
        *,
        image_size: int,
        resize: str = "adm",
    ):
        if split not in SPLITS:
            raise ValueError(f"an image folder has no split {split!r}: use 'train' or 'held_out'.")
        root = pathlib.Path(directory)
        self.folder = _split_folder(root, split)
        names = class_names(self.folder)
        found = {name: list(files_below(self.folder / name)) for name in names}
        files = {name: [x for x in found[name] if is_image(x)] for name in names}
        self._check_classes(files)
        self.label_names = names
        if split != "train" and (root / "train").is_dir():
            self.label_names = class_names(root / "train")
            self._check_known(names)
        # Names alone: a million paths would take a gigabyte.
        self.files = [file for name in names for file in files[name]]
        labels = [self.label_names.index(name) for name in names]
        self.label = np.repeat(np.asarray(labels, np.int32), [len(files[name]) for name in names])
        self.num_classes = len(self.label_names)
        self.image_shape: tuple[int, int, int] = (image_size, image_size, 3)
        self.resize = resize
        left_out = [f"{name}/{x}" for name in names for x in found[name] if not is_image(x)]
        beside = [x.name for x in self.folder.iterdir() if x.is_file() and x.name[0] != "."]
        _say_left_out(self.folder, len(left_out) + len(beside), next(iter(left_out + beside), ""))

    def _check_classes(self, files: dict[str, list[str]]) -> None:
        endings = ", ".join(EXTENSIONS)
        if not any(files.values()):
            raise ValueError(
                f"{self.folder} has no images: put them into {self.folder}/<class>/, as {endings}."
            )
        empty = [name for name, names in files.items() if not names]
        if empty:
            raise ValueError(
                f"{self.folder} has {len(empty)} of {len(files)} classes without images, the first "
                f"is {empty[0]!r}: remove its folder, or put images into it, as {endings}."
            )

    def _check_known(self, names: tuple[str, ...]) -> None:
        unknown = [name for name in names if name not in self.label_names]
        if unknown:
            raise ValueError(
                f"{self.folder} has the class {unknown[0]!r}, which the train split does not have "
                f"({len(unknown)} of {len(names)} classes are unknown to it): rename or remove it."
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        label = self.label[index]
        path = self.folder / self.label_names[label] / self.files[index]
        size, _, channels = self.image_shape
        image = images.open_square(path, size, num_channels=channels, resize=self.resize)
        return {"image": image, "label": label}


def _split_folder(root: pathlib.Path, split: str) -> pathlib.Path:
    names = SPLITS[split]
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise NoSplitError(
        f"{root} has no folder {' or '.join(names)}: put the {split} images into"
        f" {root / names[0]}/<class>/."
    )


def class_names(folder: pathlib.Path) -> tuple[str, ...]:
    """Names of the folders in it, sorted."""
    return tuple(sorted(x.name for x in folder.iterdir() if x.is_dir() and x.name[0] != "."))


def files_below(folder: pathlib.Path) -> Iterator[str]:
    """Files at any depth by name, relative to the folder; links are followed, none in a ring."""

    def fail(error: OSError) -> None:  # os.walk would pass over it
        raise error

    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(x for x in folders if x[0] != ".")
        if real not in seen:
            below = os.path.relpath(parent, folder)
            yield from (os.path.normpath(f"{below}/{x}") for x in sorted(names) if x[0] != ".")
        seen.add(real)


def is_image(name: str) -> bool:
    """Whether a file is one, by its ending."""
    return name.lower().endswith(EXTENSIONS)


@functools.cache  # a run opens a split several times
def _say_left_out(folder: pathlib.Path, count: int, example: str) -> None:
    if count:
        logging.info(
            "%s: %d files left out, such as %r: images are read from class folders, as %s",
            folder,
            count,
            example,
            ", ".join(EXTENSIONS),
        )
