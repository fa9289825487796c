"""Files of samples: uint8 images, their labels, and how they were made.

The images are the array `arr_0`, as the evaluator of ADM reads them (guided-diffusion,
evaluations/evaluator.py), and with it what follows that format. Grey images keep their one channel,
which that evaluator, made for RGB, does not take. Files of earlier versions call them
`image_uint8`, and are read too.
"""

import contextlib
import dataclasses
import json
import os
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from arcond_jax.evaluation import npz

IMAGES, IMAGES_BEFORE = "arr_0", "image_uint8"


@dataclasses.dataclass(frozen=True)
class Samples:
    """Contents of a samples file; `metadata` is what the writer said about the sampler."""

    image_uint8: UInt8[np.ndarray, "n height width channels"]
    label: Int[np.ndarray, " n"]
    num_classes: int
    metadata: dict[str, Any]


def write_samples(
    path: str | os.PathLike,
    image_uint8: np.ndarray | npz.InPieces,
    label: np.ndarray,
    *,
    num_classes: int,
    **metadata: object,
) -> None:
    """Writes samples to an npz file, whole or not at all.

    Args:
      path: File to write; its folder must exist.
      image_uint8: Images [n, height, width, channels], 0 to 255; in pieces, if they are not to be
        in memory at once.
      label: Class id of each image [n], in [0, num_classes).
      num_classes: Number of classes.
      **metadata: Anything JSON can hold: seed, temperatures, checkpoint step.

    Raises:
      ValueError: Wrong dtype or shape, a label out of range, or metadata that JSON cannot hold.
    """
    _check(image_uint8, label, num_classes, where=str(path))
    try:
        text = json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the metadata cannot be written as JSON: {error}.") from None
    npz.write(
        path,
        {
            IMAGES: image_uint8,
            "label": label.astype(np.int32),
            "num_classes": np.asarray(num_classes),
            "metadata": np.asarray(text),
        },
    )


def read_samples(path: str | os.PathLike) -> Samples:
    """Reads what `write_samples` wrote; images that take much memory are mapped from the file.

    Raises:
      FileNotFoundError: Nothing is there.
      ValueError: A truncated or foreign file, a missing entry, or entries that do not fit together.
    """
    names = ((IMAGES, IMAGES_BEFORE), "label", "num_classes", "metadata")
    arrays = npz.read(path, *names, what="samples file")
    image_uint8, label = arrays[IMAGES], arrays["label"]
    num_classes = npz.whole_number(arrays["num_classes"], where=f"{path}: num_classes", at_least=1)
    _check(image_uint8, label, num_classes, where=str(path))
    return Samples(
        image_uint8=image_uint8,
        label=label,
        num_classes=num_classes,
        metadata=_metadata(arrays["metadata"], where=str(path)),
    )


def read_about(path: str | os.PathLike) -> tuple[dict[str, Any], int] | None:
    """What a samples file says of how it was made, and its number of classes; no image is read.

    None for a file of another program, which says neither.

    Raises:
      FileNotFoundError, ValueError: As of `read_samples`.
    """
    what = "samples file"
    if not {"num_classes", "metadata"} <= npz.names_in(path, what=what):
        return None
    arrays = npz.read(path, "num_classes", "metadata", what=what)
    num_classes = npz.whole_number(arrays["num_classes"], where=f"{path}: num_classes", at_least=1)
    return _metadata(arrays["metadata"], where=str(path)), num_classes


def _metadata(array: np.ndarray, *, where: str) -> dict[str, Any]:
    metadata = None
    if array.ndim == 0 and array.dtype.kind == "U":
        with contextlib.suppress(ValueError, RecursionError):
            metadata = json.loads(str(array))
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: metadata must be a text that holds one JSON object.")
    return metadata


def _check(
    image_uint8: np.ndarray | npz.InPieces, label: np.ndarray, num_classes: int, *, where: str
) -> None:
    if image_uint8.dtype != np.uint8 or len(image_uint8.shape) != 4:
        raise ValueError(
            f"{where}: images must be uint8 [n, height, width, channels], "
            f"got {image_uint8.dtype} {list(image_uint8.shape)}."
        )
    if 0 in image_uint8.shape:
        raise ValueError(f"{where}: images {list(image_uint8.shape)} hold nothing.")
    if not np.issubdtype(label.dtype, np.integer) or label.shape != image_uint8.shape[:1]:
        raise ValueError(
            f"{where}: {image_uint8.shape[0]} images need as many integer labels, "
            f"got {label.dtype} {list(label.shape)}."
        )
    outside = (label < 0) | (label >= num_classes)
    if outside.any():
        raise ValueError(
            f"{where}: label {label[outside][0]} at row {np.argmax(outside)} is outside "
            f"[0, {num_classes}); {num_classes} itself means no class and has no images."
        )
