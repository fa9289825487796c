"""Sets of uint8 images, read a few at a time: of a file, a folder, a split, or in memory."""

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from arcond_jax import digest
from arcond_jax.data import folder, images, pipeline
from arcond_jax.evaluation import npz, samples

LABELS = ("label", "arr_1")  # ours, and what guided-diffusion's samplers write
Setting = float | int | str | bool | None


@runtime_checkable  # annotations are checked at run time in the tests
class ImageSet(Protocol):
    """Images that load as they are sliced.

    Attributes:
      image_shape: Height, width, channels.
      label: Class of each; None where it is not known.
      facts: Where they are from and how they were made, for a card.
    """

    @property
    def image_shape(self) -> tuple[int, ...]: ...

    @property
    def label(self) -> Int[np.ndarray, " n"] | None: ...

    @property
    def facts(self) -> Mapping[str, Setting]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> UInt8[np.ndarray, "rows height width channels"]: ...


class Array:
    """Images in memory."""

    def __init__(
        self,
        image_uint8: UInt8[np.ndarray, "n height width channels"],
        label: Int[np.ndarray, " n"] | None = None,
        facts: Mapping[str, Setting] | None = None,
    ) -> None:
        self._image_uint8, self.label = image_uint8, label
        self.image_shape = tuple(image_uint8.shape[1:])
        self.facts = dict(facts or {})

    def __len__(self) -> int:
        return len(self._image_uint8)

    def __getitem__(self, rows: slice) -> UInt8[np.ndarray, "rows height width channels"]:
        return self._image_uint8[rows]


class Npz(Array):
    """The images of an npz file: samples, of this package or of guided-diffusion, or a reference.

    Raises:
      FileNotFoundError, ValueError: As of `npz.read`; or the images are not uint8, not square, or
        not as many as labels.
    """

    def __init__(self, path: str | os.PathLike, *, what: str = "samples file") -> None:
        names = (samples.IMAGES, samples.IMAGES_BEFORE)
        image_uint8 = npz.read(path, names, what=what)[names[0]]
        shape, dtype = image_uint8.shape, image_uint8.dtype
        if dtype != np.uint8 or len(shape) != 4:
            raise ValueError(
                f"{path}: images must be uint8 [n, height, width, channels], got {dtype} "
                f"{list(shape)}."
            )
        check_square(shape[1:], where=str(path))
        held = npz.names_in(path, what=what)
        label = None
        if named := [name for name in LABELS if name in held]:
            label = npz.read(path, named[0], what=what)[named[0]]
            if label.shape != shape[:1] or not np.issubdtype(label.dtype, np.integer):
                raise ValueError(
                    f"{path}: {shape[0]} images need as many integer labels, got "
                    f"{label.dtype} {list(label.shape)}."
                )
        facts: dict[str, Setting] = {
            "file": os.fspath(path),
            "sha256": sha256(path),
            "image conversion": "none, uint8 in the file",
        }
        super().__init__(image_uint8, label, facts)


class Folder:
    """Image files at any depth, in the order of their names.

    Args:
      image_size: Pixels a side to crop and scale to; None for images that are square and of one
        size already, and are taken as they are.
      resize: One of `data.images.RESIZES`.

    Raises:
      FileNotFoundError, ValueError: No such folder, no images in it, or not square; and from
        slicing, an image that cannot be read or is of another size.
    """

    label = None

    def __init__(
        self, path: str | os.PathLike, *, image_size: int | None = None, resize: str = "adm"
    ) -> None:
        self._folder = pathlib.Path(path)
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{path}: no such folder of images.")
        self._files = [x for x in folder.files_below(self._folder) if folder.is_image(x)]
        if not self._files:
            endings = ", ".join(folder.EXTENSIONS)
            raise ValueError(f"{path} has no images: they end in {endings}.")
        self._image_size, self._resize = image_size, resize
        self._readers = pipeline.pool(None)
        self.image_shape = self._read(self._files[0]).shape
        check_square(self.image_shape, where=str(self._folder / self._files[0]))
        sizes = [[x, (self._folder / x).stat().st_size] for x in self._files]
        self.facts: dict[str, Setting] = {
            "folder": str(self._folder),
            "sha256 of names and sizes": digest.of_json(sizes),
            **cropped(image_size, resize),
            "image conversion": "RGB of 8 bits by PIL",
        }

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, rows: slice) -> UInt8[np.ndarray, "rows height width channels"]:
        assert self._readers is not None  # as many as there are cores
        return np.stack(list(self._readers.map(self._checked, self._files[rows])))

    def _checked(self, name: str) -> UInt8[np.ndarray, "height width channels"]:
        image = self._read(name)
        if image.shape != self.image_shape:
            raise ValueError(
                f"{self._folder / name} has {image.shape[1]} x {image.shape[0]} pixels, the first "
                f"image of its folder {self.image_shape[1]} x {self.image_shape[0]}: make them "
                "alike, or give an image size to crop and scale to."
            )
        return image

    def _read(self, name: str) -> UInt8[np.ndarray, "height width channels"]:
        path = self._folder / name
        if self._image_size is None:
            return np.asarray(images.open_image(path, num_channels=3))
        return images.open_square(path, self._image_size, num_channels=3, resize=self._resize)


class Split:
    """The images of a split of a data set."""

    def __init__(
        self,
        source: pipeline.Source,
        facts: Mapping[str, Setting],
        *,
        num_threads: int | None = None,
    ) -> None:
        self._source, self._readers = source, pipeline.pool(num_threads)
        self.image_shape, self.label = tuple(source.image_shape), source.label
        check_square(self.image_shape, where="the split")
        scaled = source.image_dtype != np.uint8
        conversion = "[-1, 1] rounded to uint8" if scaled else "RGB of 8 bits by PIL"
        self.facts = {**facts, "image conversion": conversion}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, rows: slice) -> UInt8[np.ndarray, "rows height width channels"]:
        indices = np.arange(*rows.indices(len(self)))
        image: Any = pipeline.load(self._source, indices, self._readers)["image"]
        return image if image.dtype == np.uint8 else images.image_to_uint8(image)


def check_square(image_shape: tuple[int, ...], *, where: str) -> None:
    """Raises ValueError unless height and width are equal."""
    if image_shape[0] != image_shape[1]:
        raise ValueError(
            f"{where}: images of {image_shape[1]} x {image_shape[0]} pixels are not square, as "
            "every published reference is: crop them."
        )


def sha256(path: str | os.PathLike) -> str:
    """Of a file, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        digested = hashlib.file_digest(file, "sha256")  # pyright: ignore[reportArgumentType]
    return digested.hexdigest()


def cropped(image_size: int | None, resize: str = "adm") -> dict[str, Setting]:
    """How images were brought to their size, for a card."""
    if image_size is None:
        return {"crop": "none", "resize": "none"}
    how = "as ADM: halved by means, then bicubic" if resize == "adm" else "fast: bicubic alone"
    return {"crop": "the square in the middle", "resize": f"to {image_size}, {how}"}
