"""Folders of PNG files: an image each, the same when it is read again, and no half one."""

import resource
import signal

import numpy as np
import PIL.Image
import pytest

from arcond_jax.evaluation import png_folder


def images(channels, count=11):
    return np.random.default_rng(0).integers(0, 255, (count, 6, 5, channels), dtype=np.uint8)


def read(folder, image):
    paths = sorted(folder.iterdir())
    assert [path.name for path in paths] == [f"{i:06d}.png" for i in range(len(image))]
    return np.stack([np.asarray(PIL.Image.open(path)) for path in paths]).reshape(image.shape)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_holds_an_image_each(channels, tmp_path):
    image, path = images(channels), tmp_path / "new" / "all"
    pngs = png_folder.PngFolder(path, "these")
    for start in (0, 4, 8):
        pngs.add(start, image[start : start + 4])
        assert not path.exists()
    pngs.finish()
    np.testing.assert_array_equal(read(path, image), image)
    assert [x.name for x in path.parent.iterdir()] == ["all"]


def test_an_unfinished_folder_is_filled_up(tmp_path):
    image, path = images(3), tmp_path / "all"
    path.mkdir()  # an empty one may be there
    png_folder.PngFolder(path, "these").add(0, image[:5])
    part = tmp_path / "all.part"
    (part / f"{png_folder.MARK}000005").write_bytes(b"half")
    before = (part / "000003.png").stat().st_mtime_ns
    (part / "000004.png").unlink()
    pngs = png_folder.PngFolder(path, "these")
    pngs.add(0, image)
    assert (part / "000003.png").stat().st_mtime_ns == before
    pngs.finish()
    np.testing.assert_array_equal(read(path, image), image)


def test_files_of_other_images_are_written_again(tmp_path):
    image, path = images(3), tmp_path / "all"
    png_folder.PngFolder(path, "those").add(0, 255 - image)
    pngs = png_folder.PngFolder(path, "these")
    pngs.add(0, image[:3])
    pngs.finish()
    np.testing.assert_array_equal(read(path, image[:3]), image[:3])


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    path = tmp_path / "all"
    pngs = png_folder.PngFolder(path, "these")
    pngs.add(0, images(1))
    path.mkdir()
    (path / "own.txt").touch()
    with pytest.raises(OSError, match=r"all cannot be written: Directory not empty"):
        pngs.finish()
    assert [x.name for x in path.iterdir()] == ["own.txt"]


def test_a_full_disk_leaves_no_half_image(tmp_path):
    """A limit on the size of files stands for it."""
    image = np.random.default_rng(0).integers(0, 255, (1, 100, 100, 3), dtype=np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match=r"all cannot be written: File too large"):
            png_folder.PngFolder(tmp_path / "all", "these").add(0, image)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [*tmp_path.rglob("*.png")]
