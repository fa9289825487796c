"""A file of samples that is drawn batch by batch, and gone on with where a run was stopped.

No more than two batches are in memory, whatever the number of images. Those that are drawn wait in
a folder beside the file (`evaluation.part`), so that until the end they take their bytes twice.
"""

import concurrent.futures
import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from arcond_jax import config as config_lib
from arcond_jax import digest, types
from arcond_jax.evaluation import npz, part, png_folder, samples
from arcond_jax.parallel import processes
from arcond_jax.run import drawing, exclusive, restoring
from arcond_jax.run import progress as progress_lib
from arcond_jax.sampling import mar as mar_sampling
from arcond_jax.transport import refiners

# Settings that say where and how a run is made, and change no image.
APART = ("mesh", "data", "training", "loss", "evaluation")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a file of samples is to hold.

    Attributes:
      refiner: Of the sampler.
      prompt: What the images are of.
      label: The same as numbers of classes, or of captions.
      num_classes: How many there are.
      metadata: How the images are made, as their file says it; any JSON.
      seed: Of sampling.
      batch_size: Images drawn at once; None for as many as memory allows.
      known: One row of tokens to keep, the same for all images.
    """

    refiner: types.Refiner
    prompt: types.Prompt
    label: Int[np.ndarray, " n"]
    num_classes: int
    metadata: Mapping[str, Any]
    seed: int
    batch_size: int | None = None
    known: mar_sampling.Known | None = None


def draw(
    path: str | os.PathLike,
    drawer: drawing.Drawer,
    wanted: Wanted,
    *,
    png_dir: str | os.PathLike | None = None,
    num_shown: int = 0,
) -> UInt8[np.ndarray, "shown height width channels"] | None:
    """Draws images and writes them, goes on where an earlier run of the same settings was stopped.

    The file is the same, bit for bit, however often it was stopped.

    Args:
      path: The npz file, a regular one.
      png_dir: Folder to be made beside it, with a PNG file of each image.
      num_shown: Images to return.

    Returns:
      The first images; None in all processes but the first.

    Raises:
      build.ConfigError: A label is not a class, or another run is drawing the file.
      drawing.NotFiniteError: Of some image a pixel is not a finite number.
      OSError: Something cannot be written.
      ValueError: Beside `path` lie unfinished images of other settings.
    """
    made_from = settings(drawer.trained, wanted)  # with several processes all have to ask
    num_rows = len(wanted.label)
    with exclusive.only_drawing(path), _Kept(path, made_from, png_dir) as kept:
        done, batch_size = kept.before()
        progress = progress_lib.Progress(num_rows, done=done, shown=processes.is_first())
        batches = drawer.batches(
            wanted.refiner,
            wanted.prompt,
            seed=wanted.seed,
            batch_size=wanted.batch_size or batch_size,
            known=wanted.known,
            first_row=done,
        )
        with progress:
            for number, (image_uint8, _) in enumerate(batches):
                kept.add(image_uint8)
                progress.add(len(image_uint8))
                if number == 0:
                    progress.restart()
                progress.say_at_times()
        return kept.finish(wanted, num_shown)


def settings(trained: restoring.Trained, wanted: Wanted) -> dict[str, Any]:
    """All that the images follow from, by name, as JSON has it; arrays as digests."""
    made_from = of_model(trained) | {
        "number of images": len(wanted.label),
        "seed": wanted.seed,
        "refiner": _digest(wanted.refiner),
        "labels": _sha256(wanted.label, wanted.prompt),
        "known tokens": None if wanted.known is None else _sha256(wanted.known),
        "metadata": dict(wanted.metadata),
    }
    if isinstance(wanted.refiner, refiners.InBatch):  # it mixes the rows of a batch
        made_from["--batch_size"] = wanted.batch_size
    return made_from


def of_model(trained: restoring.Trained) -> dict[str, Any]:
    """The settings and digests that images of a model follow from."""
    config = config_lib.flat(trained.config)
    chosen = {
        name: value
        for name, value in config.items()
        if name.split(".")[0] not in APART and name not in restoring.FREE_KEYS
    }
    return chosen | {
        "checkpoint": trained.step,
        "training.dtype": config["training.dtype"],
        "weights": _digest(trained.params),
        "tokenizer": _digest(trained.tokenizer),
    }


def _digest(tree: Any) -> str:
    return digest.of_json(digest.of_tree(tree))[:16]


def _sha256(*trees: Any) -> str:
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


class _Kept:
    """What is drawn on its way to the disk, written by the first process while others go on."""

    def __init__(
        self,
        path: str | os.PathLike,
        made_from: Mapping[str, Any],
        png_dir: str | os.PathLike | None,
    ) -> None:
        if not processes.is_first():
            return
        self._path, self._part = path, part.Part(part.path_of(path), made_from)
        made_of = digest.of_json(made_from)
        self._pngs = None if png_dir is None else png_folder.PngFolder(png_dir, made_of)
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future | None = None

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *_: object) -> None:
        if processes.is_first():
            self._writer.shutdown(cancel_futures=True)

    def before(self) -> tuple[int, int | None]:
        """Images that are there already, and of which batches; all processes have to ask."""

        def look() -> np.ndarray:
            return np.array([self._part.num_rows, self._part.batch_size or 0], np.int32)

        found = processes.from_first(look, jax.ShapeDtypeStruct((2,), np.int32))
        done, batch_size = (int(x) for x in found)
        if done and processes.is_first():
            logging.info("%d images are there already, in %s", done, self._part.path)
            self._write_pngs()
        return done, batch_size or None

    def _write_pngs(self) -> None:
        """Those of images that were drawn earlier."""
        first_row = 0
        for image_uint8 in self._part.batches() if self._pngs is not None else ():
            assert self._pngs is not None
            self._pngs.add(first_row, image_uint8)
            first_row += len(image_uint8)

    def add(self, image_uint8: UInt8[np.ndarray, "n height width channels"]) -> None:
        """Writes a batch while the next one is drawn, after the one before is written."""
        if processes.is_first():
            self._wait()
            self._writing = self._writer.submit(self._write, image_uint8)

    def _write(self, image_uint8: UInt8[np.ndarray, "n height width channels"]) -> None:
        if self._pngs is not None:
            self._pngs.add(self._part.num_rows, image_uint8)
        self._part.add(image_uint8)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def finish(
        self, wanted: Wanted, num_shown: int
    ) -> UInt8[np.ndarray, "shown height width channels"] | None:
        """Puts file and folder in their places; returns the first images."""
        if not processes.is_first():
            return None
        self._wait()
        shown = _first(self._part.batches(), num_shown)
        shape = (len(wanted.label), *shown.shape[1:])
        samples.write_samples(
            self._path,
            npz.InPieces(shape, np.dtype(np.uint8), self._part.batches()),
            wanted.label,
            num_classes=wanted.num_classes,
            **wanted.metadata,
        )
        if self._pngs is not None:
            self._pngs.finish()
        self._part.remove()
        return shown


def _first(
    batches: Iterator[UInt8[np.ndarray, "n height width channels"]], count: int
) -> UInt8[np.ndarray, "shown height width channels"]:
    """The first images of batches."""
    found = next(batches)
    while len(found) < count and (more := next(batches, None)) is not None:
        found = np.concatenate([found, more])
    return found[:count].copy()
