"""Files of samples: uint8 images, their labels, and how they were made."""

import dataclasses
import json
import os

import numpy as np
from jaxtyping import Int, UInt8

from arcond_jax.evaluation import npz


@dataclasses.dataclass(frozen=True)
class Samples:
    """Contents of a samples file; `metadata` is what the writer said about the sampler."""

    image_uint8: UInt8[np.ndarray, "n height width channels"]
    label: Int[np.ndarray, " n"]
    num_classes: int
    metadata: dict


def write_samples(
    path: str | os.PathLike,
    image_uint8: np.ndarray,
    label: np.ndarray,
    *,
    num_classes: int,
    **metadata: object,
) -> None:
    """Writes samples to an npz file, whole or not at all.

    Args:
      path: File to write; its folder must exist.
      image_uint8: Images [n, height, width, channels], 0 to 255.
      label: Class id of each image [n], in [0, num_classes).
      num_classes: Number of classes.
      **metadata: Anything JSON can hold: seed, temperatures, checkpoint step.

    Raises:
      ValueError: Wrong dtype or shape, a label out of range, or metadata that JSON cannot hold.
    """
    _check(image_uint8, label, num_classes, where=str(path))
    try:
        text = json.dumps(metadata)
    except TypeError as error:
        raise ValueError(f"{path}: the metadata cannot be written as JSON: {error}.") from None
    npz.write(
        path,
        {
            "image_uint8": image_uint8,
            "label": label.astype(np.int32),
            "num_classes": np.asarray(num_classes),
            "metadata": np.asarray(text),
        },
    )


def read_samples(path: str | os.PathLike) -> Samples:
    """Reads what `write_samples` wrote.

    Raises:
      FileNotFoundError: Nothing is there.
      ValueError: A truncated or foreign file, a missing entry, or entries that do not fit together.
    """
    arrays = npz.read(path, what="samples file")
    missing = {"image_uint8", "label", "num_classes", "metadata"} - arrays.keys()
    if missing:
        raise ValueError(f"{path} is not a samples file: it lacks {', '.join(sorted(missing))}.")
    num_classes = int(arrays["num_classes"])
    _check(arrays["image_uint8"], arrays["label"], num_classes, where=str(path))
    return Samples(
        image_uint8=arrays["image_uint8"],
        label=arrays["label"],
        num_classes=num_classes,
        metadata=json.loads(str(arrays["metadata"])),
    )


def _check(image_uint8: np.ndarray, label: np.ndarray, num_classes: int, *, where: str) -> None:
    if image_uint8.dtype != np.uint8 or image_uint8.ndim != 4:
        raise ValueError(
            f"{where}: images must be uint8 [n, height, width, channels], "
            f"got {image_uint8.dtype} {list(image_uint8.shape)}."
        )
    if not np.issubdtype(label.dtype, np.integer) or label.shape != image_uint8.shape[:1]:
        raise ValueError(
            f"{where}: {len(image_uint8)} images need as many integer labels, "
            f"got {label.dtype} {list(label.shape)}."
        )
    outside = (label < 0) | (label >= num_classes)
    if outside.any():
        raise ValueError(
            f"{where}: label {label[outside][0]} at row {np.argmax(outside)} is outside "
            f"[0, {num_classes}); {num_classes} itself means no class and has no images."
        )
