"""Folders of one PNG file an image, as torch-fidelity, pytorch-fid and clean-fid read them."""

import os
import pathlib
import shutil

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from arcond_jax import atomic
from arcond_jax.data import pipeline
from arcond_jax.evaluation import part

MARK = ".of"  # file that says what the images of an unfinished folder are of


class PngFolder:
    """000000.png and so on, written a batch at a time beside the folder that they will be.

    A file there is whole; a folder that was left unfinished is filled up.
    """

    def __init__(self, path: str | os.PathLike, made_of: str) -> None:
        """Looks at what is there; nothing is written before `add`.

        Args:
          path: Folder to make; an empty one may be there.
          made_of: Says what the images follow from: files of other ones are written again.
        """
        self._path, self._part = pathlib.Path(path).resolve(), part.path_of(path)
        self._made_of = made_of
        self._pool = pipeline.pool(None)
        self._there: set[int] | None = None

    def add(
        self, first_row: int, image_uint8: UInt8[np.ndarray, "n height width channels"]
    ) -> None:
        """Writes the images from number `first_row` on, grey (1 channel) or RGB (3 channels).

        Raises:
          OSError: In one line that names the folder.
        """
        with atomic.named(self._path):
            if self._there is None:
                self._there = self._begin()
            there = self._there
            wanted = [i for i in range(len(image_uint8)) if first_row + i not in there]
            assert self._pool is not None
            for _ in self._pool.map(lambda i: self._write(first_row + i, image_uint8[i]), wanted):
                pass

    def _begin(self) -> set[int]:
        """The numbers of the files that are there already."""
        mark = self._part / MARK
        if not mark.is_file() or mark.read_text("utf-8") != self._made_of:
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)
            mark.write_text(self._made_of, "utf-8")
        return {int(path.stem) for path in self._part.glob("[0-9]*.png")}

    def _write(self, row: int, image: UInt8[np.ndarray, "height width channels"]) -> None:
        picture = PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        unfinished = self._part / f"{MARK}{row:06d}"
        picture.save(unfinished, "png")
        os.replace(unfinished, self._part / f"{row:06d}.png")

    def finish(self) -> None:
        """Puts the folder in its place.

        Raises:
          OSError: There is something by now.
        """
        with atomic.named(self._path):
            for path in self._part.glob(f"{MARK}*"):
                path.unlink()
            self._part.rename(self._path)
