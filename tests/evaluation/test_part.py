"""Unfinished samples: what was kept is found again, and nothing else is taken for it."""

import json

import numpy as np
import pytest

from arcond_jax.evaluation import part

IMAGE = np.arange(7 * 3 * 3 * 1, dtype=np.uint8).reshape(7, 3, 3, 1)
SETTINGS = {"seed": 1, "sampling": {"guidance_scale": 1.5}, "sizes": (1, 2)}


@pytest.fixture
def path(tmp_path):
    return part.path_of(tmp_path / "out.npz")


def begun(path, *lengths):
    kept = part.Part(path, SETTINGS)
    for length in lengths:
        kept.add(IMAGE[kept.num_rows : kept.num_rows + length])
    return kept


def held(path):
    kept = part.Part(path, SETTINGS)
    found = [*kept.batches()]
    return np.concatenate(found) if found else IMAGE[:0]


def test_batches_of_any_size_are_found_again(path):
    assert path.name == "out.npz.part" and begun(path).batch_size is None
    assert not path.exists()  # before there is something to keep
    assert begun(path, 3, 3).batch_size == 3
    kept = part.Part(path, SETTINGS)
    assert (kept.num_rows, kept.batch_size) == (6, 3)
    kept.add(IMAGE[6:])
    np.testing.assert_array_equal(held(path), IMAGE)
    kept.remove()
    assert not path.exists()


def test_a_batch_that_was_being_written_is_none(path):
    begun(path, 3, 2)
    (path / part.UNFINISHED).write_bytes(b"\x93NUMPY")
    np.testing.assert_array_equal(held(path), IMAGE[:5])


@pytest.mark.parametrize("damage", ["missing", "short", "empty", "foreign"])
def test_what_follows_a_damaged_batch_is_drawn_again(damage, path):
    begun(path, 2, 2, 3)
    second = path / f"{2:09d}.npy"
    if damage == "foreign":
        np.save(second, np.ones((2, 3, 3, 1)))
    else:
        second.write_bytes(second.read_bytes()[: -1 if damage == "short" else 0])
    if damage == "missing":
        second.unlink()
    np.testing.assert_array_equal(held(path), IMAGE[:2])
    kept = part.Part(path, SETTINGS)
    kept.add(IMAGE[2:4])  # the third is whole, and counts again
    np.testing.assert_array_equal(held(path), IMAGE)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 2}, "3 images of an unfinished run whose seed is 1, here it is 2: go on"),
        ({"sampling": {}}, "whose guidance_scale is 1.5, here it is nothing"),
        ({"mask": 3}, "whose mask is nothing, here it is 3"),
    ],
)
def test_other_settings_are_refused_by_name(other, message, path):
    begun(path, 3)
    with pytest.raises(ValueError, match="remove the folder, or name another file") as error:
        part.Part(path, SETTINGS | other)
    assert message in str(error.value) and "\n" not in str(error.value)
    np.testing.assert_array_equal(held(path), IMAGE[:3])


def test_settings_without_images_are_replaced(path):
    begun(path, 3, 2)
    (path / f"{0:09d}.npy").unlink()  # what is left may not count with other settings
    kept = part.Part(path, SETTINGS | {"seed": 2})
    assert kept.num_rows == 0
    kept.add(IMAGE[:3])
    assert part.Part(path, SETTINGS | {"seed": 2}).num_rows == 3
    assert json.loads((path / part.SETTINGS).read_text())["seed"] == 2


def test_something_else_is_left_alone(path):
    path.mkdir()
    (path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is in the way of unfinished samples"):
        part.Part(path, SETTINGS)


def test_a_full_disk_is_one_line_and_keeps_what_is_there(path, monkeypatch):
    kept = begun(path, 3)

    def fail(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match=r"out.npz.part cannot be written: No space left on device"):
        kept.add(IMAGE[3:])
    assert sorted(x.name for x in path.iterdir()) == [f"{0:09d}.npy", part.SETTINGS]
    np.testing.assert_array_equal(held(path), IMAGE[:3])
