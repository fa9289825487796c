"""The two spellings of an image, uint8 in [0, 255] and float32 in [-1, 1]; reading and cropping."""

import io
import os
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8
from PIL import Image

MAX_ASPECT = 100  # scaled by its shorter side, a longer image takes any memory


class UnreadableError(ValueError):
    """An image that cannot be decoded, or has no middle to crop.

    Attributes:
      name: Of the image: its file, as a rule.
      why: What is wrong with it; the message is both.
    """

    def __init__(self, name: str | os.PathLike, why: str):
        super().__init__(f"{name} {why}")
        self.name, self.why = str(name), why


def uint8_to_image(
    image_uint8: UInt8[np.ndarray | Array, "*batch height width channels"],
) -> Float[Any, "*batch height width channels"]:
    """Scales 0 to -1 and 255 to 1, as float32; the same bits on the host and on every device.

    These are the numbers that x / 127.5 - 1 rounds to, all multiples of 2**-24. Compilers divide
    and subtract in their own ways, so they are counted in integers: 2**25 / 255 is 131586 + 2/255.
    """
    level = image_uint8.astype(np.int32)
    count = 131586 * level + (level >= 64) + (level >= 128) - 2**24
    return count.astype(np.float32) * np.float32(2**-24)


def as_float(
    image: Shaped[np.ndarray | Array, "*batch height width channels"],
) -> Float[Any, "*batch height width channels"]:
    """Images of a source in [-1, 1]: uint8 is scaled, float32 is there already."""
    return uint8_to_image(image) if image.dtype == np.uint8 else image


def image_to_uint8(
    image: Float[np.ndarray | Array, "*batch height width channels"],
) -> UInt8[np.ndarray, "*batch height width channels"]:
    """Rounds to the nearest of 256 levels; values outside [-1, 1] are clipped."""
    levels = (np.asarray(image, np.float32) + np.float32(1.0)) * np.float32(127.5)
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)


class Scaled:
    """Images in uint8 that are scaled to [-1, 1] as they are sliced, a few at a time."""

    def __init__(self, image_uint8: UInt8[np.ndarray, "n height width channels"]):
        self._image_uint8 = image_uint8

    def __len__(self) -> int:
        return len(self._image_uint8)

    def __getitem__(self, rows: slice) -> Float[np.ndarray, "rows height width channels"]:
        return uint8_to_image(self._image_uint8[rows])


def open_image(
    path: str | os.PathLike, *, num_channels: int, encoded: bytes | None = None
) -> Image.Image:
    """Reads an image file of any kind as 8 bits a channel, grey (1 channel) or RGB (3).

    With `encoded`, the content of the file, nothing is read and `path` is its name in messages.

    Every image of this package comes in here, by one set of rules, those of PIL's `convert`, which
    torchvision and the code of the published models use:

    - palettes, CMYK, 1 bit, grey and colour are converted into one another;
    - alpha is dropped: the colours below it come out as they are stored, on no ground;
    - of an animation, the first frame;
    - EXIF, and so its orientation, is not looked at.

    Beyond `convert`, which would clip them to white, 16 bits of grey are scaled to 8, and
    so is what PNG files hold under 32 bits, which is 16.

    Raises:
      UnreadableError: The file is missing, truncated, too large (PIL's limit against decompression
        bombs), no image, or of numbers without a known range: 32-bit integers and floats.
    """
    return _opened(path, num_channels, encoded=encoded)[0]


def _opened(
    path: str | os.PathLike,
    num_channels: int,
    *,
    at_least: int | None = None,
    encoded: bytes | None = None,
) -> tuple[Image.Image, tuple[int, int]]:
    """The image and its size in the file.

    With `at_least`, a JPEG file may come at a half, a fourth or an eighth of its size, which is
    faster; neither side then has fewer pixels than that.
    """
    opened = path if encoded is None else io.BytesIO(encoded)
    try:
        with Image.open(opened) as image:
            size = image.size
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            return _converted(image, "L" if num_channels == 1 else "RGB"), size
    except Exception as error:  # decoders raise what they like
        text = " ".join(str(error).replace(f" {opened!r}", "").split()) or type(error).__name__
        raise UnreadableError(path, f"cannot be read as an image ({text})") from None


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        levels = np.asarray(image).astype(np.int64)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert(mode)
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.format} of mode {image.mode}: save it with 8 bits")
    if image.mode in ("P", "PA") and "transparency" in image.info:
        return image.convert("RGBA").convert(mode)  # the same colours, without a warning
    if image.mode == mode:
        image.load()  # `convert` would copy it
        return image
    return image.convert(mode)


def read_image(
    path: str | os.PathLike, *, num_channels: int
) -> Float[np.ndarray, "height width channels"]:
    """An image file in [-1, 1], grey (1 channel) or in colour (3); see `open_image`.

    Raises:
      ValueError: The file is missing or no image.
    """
    pixels = np.asarray(open_image(path, num_channels=num_channels))
    return uint8_to_image(pixels.reshape(*pixels.shape[:2], num_channels))


def shrink(
    image: Float[np.ndarray | Array, "n height width channels"], size: int
) -> Float[np.ndarray, "n small_height small_width channels"]:
    """Means over equal areas, so that no side has more than `size` pixels; never enlarges."""
    image = np.asarray(image)
    for axis in (1, 2):
        if image.shape[axis] > size:
            areas = _areas(image.shape[axis], size)
            image = np.moveaxis(np.tensordot(image, areas, (axis, 1)), -1, axis)
    return image


def _areas(size: int, small: int) -> Float[np.ndarray, "small size"]:
    """Share of each of `size` pixels in each of `small` equal stretches of them; rows sum to 1."""
    edges = np.arange(small + 1) * (size / small)
    pixels = np.arange(size)
    ends = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.maximum(ends, 0.0) * (small / size)).astype(np.float32)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle, its side the image's shorter one, scaled to `size` pixels.

    Halves by 2x2 means while the image is at least twice too large, then bicubic; small images
    grow.

    Source: Dhariwal and Nichol (2021); guided-diffusion, guided_diffusion/image_datasets.py,
    `center_crop_arr`.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scaled, (left, top) = _middle(image.size, size)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def fast_center_crop(
    image: Image.Image, size: int, full_size: tuple[int, int] | None = None
) -> Image.Image:
    """The square of `center_crop`, by antialiased bicubic alone, and nothing around it.

    `full_size` is that of the image in its file, where it was decoded at a part of it.
    """
    (width, height), (left, top) = _middle(full_size or image.size, size)
    box = (
        left * image.width / width,
        top * image.height / height,
        (left + size) * image.width / width,
        (top + size) * image.height / height,
    )
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)


def _middle(image_size: tuple[int, int], size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size of an image once it is scaled for `center_crop`, and the corner of the square in it."""
    width, height = image_size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    return (width, height), ((width - size) // 2, (height - size) // 2)


RESIZES = ("adm", "fast")


def open_square(
    path: str | os.PathLike,
    size: int,
    *,
    num_channels: int,
    resize: str = "adm",
    encoded: bytes | None = None,
) -> UInt8[np.ndarray, "size size channels"]:
    """The middle of an image file, scaled to `size` pixels a side.

    Args:
      encoded: Content of the file, in the place of what lies at `path`.
      resize: "adm" as the published models were trained; "fast" differs from it a little, more
        where the image is at least twice too large, and costs less.

    Raises:
      UnreadableError: The file cannot be read, or is more than `MAX_ASPECT` times as long as wide.
    """
    fast = resize == "fast"
    at_least = size if fast else None
    image, full_size = _opened(path, num_channels, at_least=at_least, encoded=encoded)
    check_aspect(path, full_size)
    square = fast_center_crop(image, size, full_size) if fast else center_crop(image, size)
    return np.asarray(square).reshape(size, size, num_channels)


def check_aspect(path: str | os.PathLike, size: tuple[int, int]) -> None:
    """Raises UnreadableError for an image more than `MAX_ASPECT` times as long as wide."""
    if max(size) > MAX_ASPECT * min(size):
        raise UnreadableError(
            path,
            f"has {size[0]} x {size[1]} pixels and no middle to crop: at most {MAX_ASPECT} times "
            "as long as wide",
        )
