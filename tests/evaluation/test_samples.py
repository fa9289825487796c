"""Samples files: whole or absent, and refused in one line when wrong."""

import json

import numpy as np
import pytest

from arcond_jax.evaluation import samples

IMAGE = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4, 1)
LABEL = np.array([0, 2, 1])


def test_round_trip_with_metadata(tmp_path):
    path = tmp_path / "out.samples"
    samples.write_samples(path, IMAGE, LABEL, num_classes=3, seed=5, guidance={"scale": 1.5})
    read = samples.read_samples(path)
    np.testing.assert_array_equal(read.image_uint8, IMAGE)
    np.testing.assert_array_equal(read.label, LABEL)
    assert read.num_classes == 3
    assert read.metadata == {"seed": 5, "guidance": {"scale": 1.5}}
    assert [file.name for file in tmp_path.iterdir()] == ["out.samples"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "samples.npz"
    samples.write_samples(path, IMAGE, LABEL, num_classes=3)
    before = path.read_bytes()

    def fail(file, array, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="disk full"):
        samples.write_samples(path, IMAGE, LABEL, num_classes=3)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (IMAGE.astype(np.float32), LABEL, "images must be uint8 .*, got float32"),
        (IMAGE[..., 0], LABEL, r"got uint8 \[3, 4, 4\]"),
        (IMAGE, LABEL[:2], r"3 images need as many integer labels, got int64 \[2\]"),
        (IMAGE, LABEL.astype(np.float32), "integer labels, got float32"),
        (IMAGE, np.array([0, 1, 3]), r"label 3 at row 2 is outside \[0, 3\)"),
        (IMAGE, np.array([0, -1, 2]), r"label -1 at row 1"),
    ],
)
def test_wrong_arrays_are_refused_on_both_sides(tmp_path, image, label, message):
    path = tmp_path / "samples.npz"
    with pytest.raises(ValueError, match=message):
        samples.write_samples(path, image, label, num_classes=3)
    assert not path.exists()
    np.savez(path, image_uint8=image, label=label, num_classes=3, metadata="{}")
    with pytest.raises(ValueError, match=message) as error:
        samples.read_samples(path)
    assert "\n" not in str(error.value)


def test_metadata_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        samples.write_samples(tmp_path / "x", IMAGE, LABEL, num_classes=3, model=object())


def test_missing_truncated_and_foreign_files(tmp_path):
    path = tmp_path / "samples.npz"
    with pytest.raises(FileNotFoundError, match="no such samples file"):
        samples.read_samples(path)
    samples.write_samples(path, IMAGE, LABEL, num_classes=3)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a whole samples file"):
        samples.read_samples(path)
    samples.write_samples(path, IMAGE, LABEL, num_classes=3)
    path.write_bytes(path.read_bytes().replace(IMAGE.tobytes(), bytes(IMAGE.size)))
    with pytest.raises(ValueError, match="not a whole samples file: Bad CRC-32"):
        samples.read_samples(path)
    path.write_text("image,label")
    with pytest.raises(ValueError, match="not a whole samples file"):
        samples.read_samples(path)
    with path.open("wb") as file:
        np.save(file, IMAGE)
    with pytest.raises(ValueError, match="not a whole samples file"):
        samples.read_samples(path)
    np.savez(path, images=IMAGE)
    with pytest.raises(ValueError, match="lacks arr_0, label, metadata, num_classes"):
        samples.read_samples(path)


def test_the_images_are_where_the_evaluator_of_adm_reads_them(tmp_path):
    path = tmp_path / "samples.npz"
    samples.write_samples(path, IMAGE, LABEL, num_classes=3)
    with np.load(path) as file:
        assert sorted(file.files) == ["arr_0", "label", "metadata", "num_classes"]
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], IMAGE)


def test_files_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, image_uint8=IMAGE, label=LABEL, num_classes=3, metadata="{}")
    np.testing.assert_array_equal(samples.read_samples(path).image_uint8, IMAGE)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_classes", np.arange(3), r"num_classes must be one whole number .* int64 \[3\]"),
        ("num_classes", np.asarray(np.inf), "num_classes must be one whole number"),
        ("metadata", np.asarray("[" * 100_000), "metadata must be a text that holds one JSON"),
        ("metadata", np.asarray(json.dumps([1])), "metadata must be a text that holds one JSON"),
        ("metadata", np.arange(3), "metadata must be a text that holds one JSON"),
        ("metadata", np.asarray("{"), "metadata must be a text that holds one JSON"),
        ("arr_0", IMAGE[:0], "hold nothing"),
    ],
)
def test_wrong_contents_are_one_line(name, value, message, tmp_path):
    path = tmp_path / "samples.npz"
    whole = dict(arr_0=IMAGE, label=LABEL, num_classes=np.asarray(3), metadata=np.asarray("{}"))
    np.savez(path, **{**whole, name: value})
    with pytest.raises(ValueError, match=message) as error:
        samples.read_samples(path)
    assert "\n" not in str(error.value)
