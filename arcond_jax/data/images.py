"""The two spellings of an image, uint8 in [0, 255] and float32 in [-1, 1]; reading and cropping."""

import pathlib

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image


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


def read_image(
    path: pathlib.Path, *, num_channels: int
) -> Float[np.ndarray, "height width channels"]:
    """An image file in [-1, 1], grey (1 channel) or in colour (3).

    Raises:
      ValueError: The file is missing or no image.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if num_channels == 1 else "RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from None
    return uint8_to_image(pixels.reshape(*pixels.shape[:2], num_channels))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle, its side the image's shorter one, scaled to `size` pixels.

    Halves by 2x2 means while the image is at least twice too large, then bicubic; small images
    grow.

    Source: Dhariwal and Nichol (2021); guided-diffusion, guided_diffusion/image_datasets.py,
    `center_crop_arr`.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
