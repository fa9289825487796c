"""Sets of images give the same images however they lie, a few at a time."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from arcond_jax.data import digits, images
from arcond_jax.evaluation import image_sets, npz, samples

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (10, 6, 6, 3), dtype=np.uint8)
LABEL = np.arange(10) % 3


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "samples.npz"
    samples.write_samples(path, IMAGE, LABEL, num_classes=3)
    return path


@pytest.fixture
def deflated(tmp_path):
    path = tmp_path / "adm.npz"
    np.savez_compressed(path, arr_0=IMAGE, arr_1=LABEL.astype(np.int64))
    return path


@pytest.fixture
def pngs(tmp_path):
    folder = tmp_path / "pngs"
    (folder / "b").mkdir(parents=True)
    for i, image in enumerate(IMAGE):
        Image.fromarray(image).save(folder / ("b" if i > 4 else "") / f"{i:06d}.png")
    return folder


def test_they_hold_the_same_images(stored, deflated, pngs):
    sets = [
        image_sets.Npz(stored),
        image_sets.Npz(deflated),
        image_sets.Folder(pngs),
        image_sets.Array(IMAGE, LABEL),
    ]
    for one in sets:
        assert isinstance(one, image_sets.ImageSet)
        assert (len(one), one.image_shape) == (10, (6, 6, 3))
        for rows in (slice(0, 4), slice(4, 6), slice(9, 20), slice(2, 3)):  # the last goes back
            np.testing.assert_array_equal(one[rows], IMAGE[rows])
    for one in (sets[0], sets[1], sets[3]):
        np.testing.assert_array_equal(one.label, LABEL)
    assert sets[2].label is None
    assert sets[0].facts["sha256"] != sets[1].facts["sha256"]


def test_a_large_file_is_never_whole_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "HELD", 1 << 20)
    monkeypatch.setattr(npz, "PIECE", 1 << 18)
    path = tmp_path / "large.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, arr_0=np.zeros((800, 64, 64, 3), np.uint8))  # 10 MB
        tracemalloc.start()
        found = image_sets.Npz(path)
        assert sum(len(found[start : start + 8]) for start in range(0, 800, 8)) == 800
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
        tracemalloc.stop()


def test_a_folder_is_cropped_and_scaled(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(RNG.integers(0, 256, (20, 31, 3), dtype=np.uint8)).save(path)
    found = image_sets.Folder(tmp_path, image_size=8)
    np.testing.assert_array_equal(found[0:1][0], images.open_square(path, 8, num_channels=3))
    assert found.facts["crop"] == "the square in the middle"
    assert found.facts["resize"].startswith("to 8, as ADM")
    with pytest.raises(ValueError, match="31 x 20 pixels are not square"):
        image_sets.Folder(tmp_path)


def test_a_split_is_rounded_to_uint8():
    source = digits.Digits("held_out")
    found = image_sets.Split(source, {"data": "digits"})
    assert (len(found), found.image_shape) == (360, (8, 8, 1))
    np.testing.assert_array_equal(found[3:5], images.image_to_uint8(source.image[3:5]))
    assert found.facts == {"data": "digits", "image conversion": "[-1, 1] rounded to uint8"}


def test_bad_sets_are_one_line(tmp_path, pngs):
    def saved(**arrays):
        path = tmp_path / "bad.npz"
        np.savez(path, **arrays)
        return path

    Image.fromarray(IMAGE[0, :3, :3]).save(pngs / "z.png")
    (tmp_path / "empty").mkdir()
    cases = [
        (lambda: image_sets.Npz(tmp_path / "none.npz"), "no such samples file"),
        (lambda: image_sets.Npz(saved(x=IMAGE)), "lacks arr_0"),
        (lambda: image_sets.Npz(saved(arr_0=IMAGE / 255.0)), "images must be uint8 .* got float64"),
        (lambda: image_sets.Npz(saved(arr_0=IMAGE[..., 0])), r"got uint8 \[10, 6, 6\]"),
        (lambda: image_sets.Npz(saved(arr_0=IMAGE[:, :4])), "6 x 4 pixels are not square"),
        (lambda: image_sets.Npz(saved(arr_0=IMAGE, label=LABEL[:3])), r"labels, got int64 \[3\]"),
        (lambda: image_sets.Folder(tmp_path / "none"), "no such folder of images"),
        (lambda: image_sets.Folder(tmp_path / "empty"), "has no images: they end in .jpg"),
        (lambda: image_sets.Folder(pngs)[0:11], r"z.png has 3 x 3 pixels, the first .* 6 x 6"),
    ]
    for make, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            make()
        assert "\n" not in str(error.value)


def test_damage_is_found_at_once(stored):
    stored.write_bytes(stored.read_bytes().replace(IMAGE.tobytes(), bytes(IMAGE.size)))
    with pytest.raises(ValueError, match=r"not a whole samples file: Bad CRC-32.*\(arr_0\)"):
        image_sets.Npz(stored)
    stored.write_bytes(stored.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a whole samples file: truncated"):
        image_sets.Npz(stored)
