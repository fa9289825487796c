"""The image folder: order and labels of its items, its crop, and what it says of bad folders."""

import logging
import pathlib
import shutil

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from arcond_jax import build
from arcond_jax.data import folder, images, pipeline
from arcond_jax.run import training

GREY = {"a": (10, 30), "b": (50,), "c": (70, 90, 110)}  # value of each file of each class


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)


@pytest.fixture
def directory(tmp_path):
    """Written backwards, so that the file system's order is not the order of names."""
    for name, values in reversed(GREY.items()):
        for i, value in reversed(list(enumerate(values))):
            write(tmp_path / "train" / name / f"{i}.png", np.full((8, 8, 3), value))
    (tmp_path / "train" / "b" / "notes.txt").write_text("no image")
    write(tmp_path / "train" / "b" / "._0.png", np.zeros((8, 8, 3)))
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "index.json").write_text("{}")
    return tmp_path


def test_items_come_by_class_and_name(directory):
    source = folder.ImageFolder(directory, "train", image_size=8)
    assert isinstance(source, pipeline.Source)
    assert source.num_classes == 3 and source.label_names == ("a", "b", "c")
    assert source.image_shape == (8, 8, 3) and len(source) == 6
    items = [source[i] for i in range(len(source))]
    assert [int(item["image"][0, 0, 0]) for item in items] == [10, 30, 50, 70, 90, 110]
    assert [int(item["label"]) for item in items] == [0, 0, 1, 2, 2, 2]
    assert items[0]["image"].dtype == np.uint8 and items[0]["label"].dtype == np.int32


def test_any_kind_of_image_becomes_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 40, 60))
    kinds = dict(L="1.PNG", RGBA="2.png", P="3.webp", CMYK="4.JPEG", RGB="5.jpg")
    (tmp_path / "train" / "red").mkdir(parents=True)
    for mode, name in kinds.items():
        red.convert(mode).save(tmp_path / "train" / "red" / name)
    source = folder.ImageFolder(tmp_path, image_size=8)
    levels = np.stack([source[i]["image"][4, 4] for i in range(5)])
    assert len(source) == 5 and np.all(levels[0] == levels[0, 0])
    # The last three lose a little to compression or to their palette.
    np.testing.assert_allclose(levels[1:].astype(int), [[200, 40, 60]] * 4, atol=25)


def test_exif_orientation_is_not_looked_at(tmp_path):
    ramp = np.broadcast_to(np.arange(0, 256, 16)[:, None, None], (16, 16, 3))  # dark at the top
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    write(tmp_path / "train" / "a" / "0.jpg", ramp, quality=100, exif=exif)
    image = folder.ImageFolder(tmp_path, image_size=16)[0]["image"]
    assert np.all(np.diff(image[:, 8, 0].astype(int)) > 0)


@pytest.mark.parametrize("first", ["val", "validation", "held_out", "test"])
def test_held_out_is_the_first_folder_of_that_kind(tmp_path, first):
    names = ("val", "validation", "held_out", "test")
    for i, name in enumerate(names[names.index(first) :]):
        write(tmp_path / name / "a" / "0.png", np.full((4, 4, 3), 10 * i))
    source = folder.ImageFolder(tmp_path, "held_out", image_size=4)
    assert source.folder.name == first and source[0]["image"].max() == 0


def test_crop_keeps_the_middle_of_either_long_side():
    pixels = np.zeros((8, 14, 3), np.uint8)
    pixels[:, 3:11] = np.arange(8)[:, None, None] * 16 + 5
    for image in (pixels, pixels.transpose(1, 0, 2)):
        cropped = images.center_crop(Image.fromarray(image), 8)
        side = image.shape.index(14)
        middle = image[:, 3:11] if side == 1 else image[3:11]
        np.testing.assert_array_equal(cropped, middle)


def test_crop_halves_by_means_before_anything_else():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    cropped = np.asarray(images.center_crop(Image.fromarray(pixels), 8)).astype(float)
    means = pixels.reshape(8, 4, 12, 4, 3).astype(float).mean((1, 3))
    # Each of the two halvings rounds along rows and along columns, by half a level at most.
    np.testing.assert_allclose(cropped, means[:, 2:10], atol=2.0)


@pytest.mark.parametrize("shape", [(5, 9), (50, 31), (17, 17), (101, 33)])
def test_crop_has_its_size_whatever_comes(shape):
    constant = np.full((*shape, 3), 77, np.uint8)
    cropped = np.asarray(images.center_crop(Image.fromarray(constant), 16))
    assert cropped.shape == (16, 16, 3) and np.all(cropped == 77)


PHOTOGRAPHS = pathlib.Path(sklearn.datasets.__file__).parent / "images"  # two, of 640x427


@pytest.mark.parametrize(
    ("size", "share", "largest", "mean"),
    # One pass of the same filter; and a JPEG decoded at a half, in place of means of 2x2 pixels.
    [(256, 0.001, 1, 0.001), (300, 0.001, 2, 0.001), (128, 0.7, 60, 2.3), (64, 0.85, 40, 2.3)],
)
def test_fast_differs_from_adm_by_so_much(size, share, largest, mean):
    paths = sorted(PHOTOGRAPHS.glob("*.jpg"))
    adm, fast = (
        np.stack([images.open_square(x, size, num_channels=3, resize=resize) for x in paths])
        for resize in images.RESIZES
    )
    assert adm.shape == fast.shape == (2, size, size, 3) and adm.dtype == fast.dtype == np.uint8
    difference = np.abs(adm.astype(int) - fast)
    assert np.mean(difference > 0) <= share
    assert difference.max() <= largest and difference.mean() <= mean


@pytest.mark.parametrize("shape", [(5, 9), (50, 31), (17, 17), (101, 33), (130, 129)])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_fast_has_its_size_whatever_comes(shape, kind, tmp_path):
    write(tmp_path / "train" / "a" / f"0.{kind}", np.full((*shape, 3), 77))
    image = folder.ImageFolder(tmp_path, image_size=16, resize="fast")[0]["image"]
    assert image.shape == (16, 16, 3) and np.all(image == 77)


def test_a_truncated_file_is_named(directory):
    path = directory / "train" / "b" / "1.jpg"
    write(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    path.write_bytes(path.read_bytes()[:900])
    (directory / "train" / "b" / "2.png").write_text("no image either")
    source = folder.ImageFolder(directory, image_size=8)
    for index, name in ((3, "1.jpg"), (4, "2.png")):
        with pytest.raises(ValueError, match=name) as error:
            source[index]
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"Item 3 of ImageFolder cannot be .*1\.jpg cannot"):
        list(pipeline.full_batches(source, 4))


def test_a_folder_that_is_not_one_is_refused(directory):
    with pytest.raises(ValueError, match="no split 'val': use 'train' or 'held_out'"):
        folder.ImageFolder(directory, "val", image_size=8)
    with pytest.raises(ValueError, match="no folder val or validation or held_out or test: put"):
        folder.ImageFolder(directory, "held_out", image_size=8)
    with pytest.raises(ValueError, match=r"nowhere has no folder train: put the train images into"):
        folder.ImageFolder(directory / "nowhere", image_size=8)
    (directory / "val" / "a").mkdir(parents=True)
    write(directory / "val" / "loose.png", np.zeros((8, 8)))
    with pytest.raises(ValueError, match=r"val has no images: put them into .*val/<class>/, as"):
        folder.ImageFolder(directory, "held_out", image_size=8)


def test_images_at_any_depth_belong_to_their_class(directory):
    write(directory / "train" / "b" / "2024" / "May" / "0.JPG", np.full((8, 8, 3), 60))
    write(directory / "train" / "b" / ".trash" / "0.png", np.zeros((8, 8, 3)))
    (directory / "train" / "b" / "ring").symlink_to(directory / "train" / "b")
    source = folder.ImageFolder(directory, image_size=8)
    assert source.files == ["0.png", "1.png", "0.png", "2024/May/0.JPG", "0.png", "1.png", "2.png"]
    assert list(source.label) == [0, 0, 1, 1, 2, 2, 2]
    assert int(source[3]["image"][0, 0, 0]) in (59, 60, 61)


def test_what_is_left_out_is_counted_and_said_once(directory, caplog):
    (directory / "train" / "c" / "deep").mkdir()
    (directory / "train" / "c" / "deep" / "0.bmp").write_bytes(b"")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            folder.ImageFolder(directory, image_size=8)
    # Besides the .bmp: b/notes.txt, and index.json beside the classes.
    expected = f"{directory / 'train'}: 3 files left out, such as 'b/notes.txt': images are read"
    assert [expected in message for message in caplog.messages] == [True]


def test_an_empty_class_is_refused_by_name(directory):
    (directory / "train" / "bb").mkdir()
    (directory / "train" / "bb" / "0.bmp").write_text("no image by its ending")
    message = r"train has 1 of 4 classes without images, the first is 'bb': remove its folder, or"
    with pytest.raises(ValueError, match=message):
        folder.ImageFolder(directory, image_size=8)


def test_held_out_labels_are_those_of_the_train_split(directory):
    for name in ("c", "b"):
        write(directory / "val" / name / "0.png", np.zeros((8, 8, 3)))
    source = folder.ImageFolder(directory, "held_out", image_size=8)
    assert source.label_names == ("a", "b", "c") and source.num_classes == 3
    assert [int(source[i]["label"]) for i in range(2)] == [1, 2]
    write(directory / "val" / "d" / "0.png", np.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match=r"val has the class 'd', which .* \(1 of 3 classes are"):
        folder.ImageFolder(directory, "held_out", image_size=8)


def test_an_image_without_a_middle_is_refused(directory):
    write(directory / "train" / "b" / "1.png", np.zeros((2, 300, 3)))
    source = folder.ImageFolder(directory, image_size=8)
    with pytest.raises(ValueError, match=r"1.png has 300 x 2 pixels and no middle to crop"):
        source[3]
    source.resize = "fast"
    with pytest.raises(ValueError, match=r"1.png has 300 x 2 pixels and no middle to crop"):
        source[3]


def test_training_warns_of_held_out_images_it_could_not_be_evaluated_with(directory, caplog):
    config = build.load_config(f"own_images:{directory}", ["data.image_size=64"])
    training._warn_of_held_out(config)  # there are none
    assert not caplog.messages
    write(directory / "val" / "d" / "0.png", np.zeros((8, 8, 3)))
    training._warn_of_held_out(config)
    shutil.rmtree(directory / "val" / "d")
    (directory / "val" / "a").mkdir()
    training._warn_of_held_out(config)
    assert len(caplog.messages) == 2 and "has the class 'd'" in caplog.messages[0]
    assert "val has no images" in caplog.messages[1]
