"""Image files with bytes changed, cut or added: read as images, or refused in one line."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from arcond_jax.data import images


def encoded(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB" if kind != "gif" else "P").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("count", [40, pytest.param(1_500, marks=pytest.mark.slow)])
def test_mutated_images(count, kind, tmp_path):
    rng, whole, path = random.Random(0), encoded(kind), tmp_path / f"x.{kind}"
    refusals = []
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            image = images.read_image(path, num_channels=3)
            assert image.shape[-1] == 3 and np.isfinite(image).all()
        except ValueError as error:
            refusals.append(str(error))
    assert refusals and all("\n" not in line and str(path) in line for line in refusals)
