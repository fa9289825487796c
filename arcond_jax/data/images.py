"""The two spellings of an image, uint8 in [0, 255] and float32 in [-1, 1], and the way between."""

import numpy as np
from jaxtyping import Array, Float, UInt8


def uint8_to_image(
    image_uint8: UInt8[np.ndarray, "*batch height width channels"],
) -> Float[np.ndarray, "*batch height width channels"]:
    """Scales 0 to -1 and 255 to 1, as float32."""
    return image_uint8.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def image_to_uint8(
    image: Float[np.ndarray | Array, "*batch height width channels"],
) -> UInt8[np.ndarray, "*batch height width channels"]:
    """Rounds to the nearest of 256 levels; values outside [-1, 1] are clipped."""
    levels = (np.asarray(image, np.float32) + np.float32(1.0)) * np.float32(127.5)
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)
