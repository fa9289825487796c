"""How files of images are read: one rule for each kind, and one line for those that have none."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from arcond_jax.data import images

RAMP = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))


def levels(path, num_channels=1):
    image = images.read_image(path, num_channels=num_channels)
    assert image.dtype == np.float32 and image.shape[-1] == num_channels
    return images.image_to_uint8(image)


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_sixteen_bits_of_grey_are_scaled(kind, num_channels, tmp_path):
    path = tmp_path / f"image.{kind.split()[-1]}"
    sixteen = RAMP.astype(">u2" if "big" in kind else "<u2") * 257
    Image.fromarray(sixteen).save(path)
    with Image.open(path) as image:
        assert image.mode.startswith("I")
    found = levels(path, num_channels)
    np.testing.assert_array_equal(found, np.repeat(RAMP[..., None], num_channels, -1))


def test_sixteen_bits_are_rounded_to_the_nearest_level(tmp_path):
    values = np.arange(0, 65536, 128, dtype=np.uint16).reshape(8, 64)
    Image.fromarray(values).save(tmp_path / "image.png")
    expected = np.round(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(levels(tmp_path / "image.png")[..., 0], expected)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_range_are_refused(dtype, tmp_path):
    path = tmp_path / "image.tiff"
    Image.fromarray(RAMP.astype(dtype)).save(path)
    mode = "I" if dtype == np.int32 else "F"
    with pytest.raises(ValueError, match=f"image.tiff cannot be .* mode {mode}: save it with 8"):
        images.read_image(path, num_channels=1)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_converted(mode, tmp_path):
    path = tmp_path / "image.tiff"
    Image.fromarray(RAMP).convert("RGB").convert(mode).save(path)
    for num_channels in (1, 3):
        np.testing.assert_allclose(levels(path, num_channels)[..., 0].astype(int), RAMP, atol=2)


def test_one_bit_is_black_and_white(tmp_path):
    Image.fromarray(RAMP > 100).save(tmp_path / "image.png")
    np.testing.assert_array_equal(levels(tmp_path / "image.png")[..., 0], 255 * (RAMP > 100))


def test_alpha_is_dropped_and_not_laid_on_a_ground(tmp_path):
    image = Image.new("RGBA", (4, 4), (200, 40, 60, 0))
    image.save(tmp_path / "a.png")
    palette = Image.new("RGB", (4, 4), (200, 40, 60)).quantize(4)
    palette.save(tmp_path / "p.png", transparency=bytes([0, 0, 0, 0]))
    for name in ("a.png", "p.png"):
        assert np.all(levels(tmp_path / name, 3) == (200, 40, 60))


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_read(kind, tmp_path):
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (40, 120, 250)]
    path = tmp_path / f"image.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert np.all(levels(path, 3) == 40)


def bomb():
    """A PNG whose header says a million pixels a side."""
    buffer = io.BytesIO()
    Image.fromarray(RAMP).save(buffer, "png")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", 1_000_000, 1_000_000)
    return bytes(data)


def test_what_is_no_whole_image_is_refused_in_one_line(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(RAMP).save(buffer, "jpeg")
    for data in (buffer.getvalue()[:500], bomb(), b"", b"text\n" * 9):
        path = tmp_path / "image.png"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"image.png cannot be read as an image \(") as error:
            images.read_image(path, num_channels=3)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        images.read_image(tmp_path, num_channels=3)


@pytest.mark.filterwarnings("ignore")  # PIL's own, of odd files
def test_damaged_images_are_read_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "image", []
    for kind in ("png", "jpeg", "webp", "gif", "tiff", "bmp"):
        buffer = io.BytesIO()
        Image.fromarray(RAMP).save(buffer, kind)
        for _ in range(25):
            data = np.frombuffer(buffer.getvalue(), np.uint8).copy()
            where = rng.integers(0, min(len(data), 200), 3)
            data[where] = rng.integers(0, 256, 3)
            path.write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)].tobytes())
            try:
                images.read_image(path, num_channels=3)
            except ValueError as error:
                refused.append(str(error))
    assert len(refused) > 50 and not any("\n" in line for line in refused)


@pytest.mark.parametrize(("size", "small"), [((64, 32), 16), ((50, 33), 32), ((7, 5), 3)])
def test_shrunk_images_keep_their_mean(size, small):
    image = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    found = images.shrink(image, small)
    assert found.shape == (2, min(size[0], small), min(size[1], small), 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.mean((1, 2)), image.mean((1, 2)), atol=1e-6)


def test_shrunk_images_are_means_of_blocks_and_small_ones_stay():
    image = np.random.default_rng(0).uniform(-1, 1, (2, 64, 32, 1)).astype(np.float32)
    blocks = image.reshape(2, 16, 4, 16, 2, 1).mean((2, 4))
    np.testing.assert_allclose(images.shrink(image, 16), blocks, atol=1e-6)
    assert images.shrink(image, 64) is image


def test_scaled_images_are_scaled_where_they_are_sliced():
    scaled = images.Scaled(np.stack([RAMP, RAMP // 2])[..., None])
    assert len(scaled) == 2
    np.testing.assert_array_equal(scaled[1:], images.uint8_to_image((RAMP // 2)[None, ..., None]))
