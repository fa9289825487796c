"""What an evaluation reads off images: features to compare sets by, and logits of classes."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float


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

    def __call__(
        self, image: Float[np.ndarray | Array, "b height width channels"]
    ) -> tuple[Float[Array, "b features"], Float[Array, "b classes"]]:
        """Features and unnormalised log-probabilities of images in [-1, 1]."""
        ...
