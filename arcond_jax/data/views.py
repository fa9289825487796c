"""Views of an image that a model is trained on in turn: its crops and their mirror images."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

CROP_RANGE = 1.1  # of LlamaGen's extract_codes_c2i.py and RAR's
KINDS = ("one", "flip", "ten")
PLACES = ("centre", "top left", "top right", "bottom left", "bottom right")


@dataclasses.dataclass(frozen=True)
class Views:
    """Which views there are: "one"; "flip", also its mirror image; or "ten" crops for each range.

    The ten are torchvision's `TenCrop`, the centre first: centre and corners of a square that is
    larger than the image, and those of its mirror image.

    Attributes:
      crop_ranges: Sides of these squares, as multiples of the image's; none for the other kinds.

    Raises:
      ValueError: For another kind, and ranges that do not fit it.

    Source: autoregressive/train/extract_codes_c2i.py of FoundationVision/LlamaGen.
    """

    kind: str
    crop_ranges: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"views {self.kind!r} are not one of {', '.join(KINDS)}")
        if (self.kind == "ten") != bool(self.crop_ranges):
            raise ValueError(f"crop ranges go with views ten, not with {self.kind}: leave them out")
        for crop_range in self.crop_ranges:
            if not 1.0 <= crop_range <= 2.0:
                raise ValueError(f"crop range {crop_range:g} must be at least 1 and at most 2")

    @property
    def names(self) -> tuple[str, ...]:
        """What each view shows, in their order."""
        if self.kind != "ten":
            return ("centre", "centre, mirrored")[: 1 + (self.kind == "flip")]
        places = (*PLACES, *(f"mirrored, {place}" for place in PLACES))
        return tuple(f"{place} of {x:g}" for x in self.crop_ranges for place in places)

    def sides(self, size: int) -> tuple[int, ...]:
        """Sides in pixels of the squares that views of `size` pixels are cut from."""
        return tuple(int(size * x) for x in self.crop_ranges) or (size,)

    def cut(
        self, squares: Sequence[Shaped[np.ndarray, "_ _ channels"]], size: int
    ) -> Shaped[np.ndarray, "views size size channels"]:
        """The views, from squares of these sides."""
        if self.kind == "ten":
            return np.stack([x for square in squares for x in _ten(square, size)])
        (square,) = squares
        return np.stack((square, square[:, ::-1])[: len(self.names)])


def _ten(square: np.ndarray, size: int) -> list[np.ndarray]:
    far = len(square) - size
    middle = round(far / 2)  # to even, as torchvision does
    corners = ((middle, middle), (0, 0), (0, far), (far, 0), (far, far))
    return [
        image[top : top + size, left : left + size]
        for image in (square, square[:, ::-1])
        for top, left in corners
    ]
