"""What an evaluation reads off images: features to compare sets by, and logits of classes.

Images pass batch by batch, so that no set of photographs is ever whole in memory.
"""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Float32, Shaped

from arcond_jax.data import images

BATCH_SIZE = 64  # 200 MB at 512x512 in colour, and a few times that on the way
SMALL = 32  # pixels a side at most, where pixels themselves are compared


class Outputs(NamedTuple):
    """What is read off a batch of images, float32.

    Attributes:
      features: To compare sets of images by.
      logits: Unnormalised log-probabilities of classes.
      spatial: Features that know where in the image they are, for sFID; None where there are none.
    """

    features: Float[Array, "b features"]
    logits: Float[Array, "b classes"]
    spatial: Float[Array, "b spatial"] | None = None


@runtime_checkable  # annotations are checked at run time in the tests
class Features(Protocol):
    """A network that reads images.

    Attributes:
      description: What it is, in words, for the evaluation card.
      num_classes: Classes of its logits.
    """

    @property
    def description(self) -> str: ...

    @property
    def num_classes(self) -> int: ...

    def __call__(self, image: Shaped[np.ndarray | Array, "b height width channels"]) -> Outputs:
        """Reads images, uint8 or floats in [-1, 1]."""
        ...


def batch_size(extractor: Features) -> int:
    """Images that a device reads at a time: what the network says, else `BATCH_SIZE`.

    The same number on every device, one or many, gives an image the same features to the last bit.
    """
    return min(getattr(extractor, "batch_size", BATCH_SIZE), BATCH_SIZE)


@runtime_checkable
class Images(Protocol):
    """Images in [-1, 1]: an array [n, height, width, channels], or what loads as it is sliced."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Float[np.ndarray, "rows height width channels"]: ...


@dataclasses.dataclass(frozen=True)
class Reading:
    """All that an evaluation keeps of a set of images.

    Attributes:
      features: Of the extractor.
      logits: Of the extractor.
      image_small: The images, averaged over equal areas to at most `SMALL` pixels a side; images
        that are as small are kept as they are.
      image_shape: Height, width and channels that they had.
    """

    features: Float32[np.ndarray, "n features"]
    logits: Float32[np.ndarray, "n classes"]
    image_small: Float[np.ndarray, "n small_height small_width channels"]
    image_shape: tuple[int, ...]


def read(extractor: Features, image: Images, *, what: str) -> Reading:
    """Reads a set of images, `BATCH_SIZE` at a time.

    Args:
      extractor: Source of features and logits.
      image: At least one image.
      what: The set in words, for the error message, such as "samples".

    Raises:
      ValueError: No image, or one that is not finite or outside [-1, 1].
    """
    if len(image) == 0:
        raise ValueError(f"There are no {what} to evaluate.")
    features, logits, small, shape = [], [], [], ()
    for start in range(0, len(image), BATCH_SIZE):
        batch = image[start : start + BATCH_SIZE]
        count, shape = len(batch), batch.shape[1:]
        low, high = batch.min(), batch.max()
        if not (low >= -1.0 and high <= 1.0):  # not (...) so that NaN fails too
            raise ValueError(
                f"The {what} span {low:g} to {high:g}, outside [-1, 1]: convert or clip them first."
            )
        small.append(images.shrink(batch, SMALL))
        if start:  # filled up, the last batch needs no program of its own
            batch = np.concatenate([batch, np.repeat(batch[-1:], BATCH_SIZE - count, axis=0)])
        outputs = extractor(batch)
        features.append(np.asarray(outputs.features, np.float32)[:count])
        logits.append(np.asarray(outputs.logits, np.float32)[:count])
    return Reading(np.concatenate(features), np.concatenate(logits), np.concatenate(small), shape)
