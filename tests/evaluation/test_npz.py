"""Files of arrays: only what is asked for is read, and all damage ends in one line."""

import io
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from arcond_jax.evaluation import npz, samples

ARRAYS = {"image": np.arange(48, dtype=np.uint8).reshape(3, 4, 4), "count": np.asarray(3)}


def header(shape, descr="|u1"):
    """The head of an npy file, whatever its shape says."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.fixture
def path(tmp_path):
    return tmp_path / "arrays.npz"


def with_member(path, data, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("image.npy", data)


def refused(path, *names):
    with pytest.raises(ValueError, match=r"arrays\.npz is not a") as error:
        npz.read(path, *names, what="file")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize("held", [npz.HELD, 0])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(save, held, path, monkeypatch):
    monkeypatch.setattr(npz, "HELD", held)
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    foreign = np.arange(3, dtype=">i4")
    save(path, **ARRAYS, fortran=fortran, foreign=foreign, text=np.asarray("é"), empty=np.ones(0))
    found = npz.read(path, "image", "count", "fortran", "foreign", "text", "empty", what="file")
    for name, value in {**ARRAYS, "fortran": fortran, "foreign": foreign}.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype.isnative
    assert str(found["text"]) == "é" and found["empty"].shape == (0,)
    assert isinstance(found["image"], np.memmap) == (held == 0)
    with pytest.raises(ValueError, match="read-only"):
        found["image"][0] = 0


def test_the_bytes_are_those_of_numpy(path):
    buffer = io.BytesIO()
    np.savez(buffer, **ARRAYS)
    npz.write(path, ARRAYS)
    assert path.read_bytes() == buffer.getvalue()
    image = ARRAYS["image"]
    pieces = (image[start : start + 2] for start in (0, 2))
    npz.write(path, {**ARRAYS, "image": npz.InPieces(image.shape, image.dtype, pieces)})
    assert path.read_bytes() == buffer.getvalue()


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([ARRAYS["image"][:2]], "the pieces of image have 2 rows, the array 3"),
        (
            [ARRAYS["image"][:, :2]],
            r"a piece of image is uint8 \[3, 2, 4\], the array",
        ),
        ([ARRAYS["image"].astype(int)], "a piece of image is int64"),
    ],
)
def test_pieces_that_are_no_array_leave_no_file(pieces, message, path):
    image = ARRAYS["image"]
    with pytest.raises(ValueError, match=message):
        npz.write(path, {"image": npz.InPieces(image.shape, image.dtype, pieces)})
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_large_array_takes_no_memory(compression, path, monkeypatch):
    """One of 64 MiB, and what stands in front of it in the file."""
    monkeypatch.setattr(npz, "HELD", 1 << 24)
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        archive.writestr("other.npy", bytes(100))
        with archive.open("image.npy", "w") as member:
            member.write(header((1 << 26,)))
            for value in range(64):
                member.write(bytes([value]) * (1 << 20))
    tracemalloc.start()
    image = npz.read(path, "image", what="file")["image"]
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
    np.testing.assert_array_equal(image[:: 1 << 20], np.arange(64))
    path.unlink()  # what is mapped stays
    assert image[-1] == 63


def test_a_tuple_names_an_array_in_turn(path):
    np.savez(path, old=np.ones(2), new=np.zeros(2))
    assert npz.read(path, ("new", "old"), what="file")["new"][0] == 0.0
    np.savez(path, old=np.ones(2))
    assert npz.read(path, ("new", "old"), what="file")["new"][0] == 1.0
    assert "it lacks new, x" in refused(path, "x", ("new", "older"))


def test_what_nobody_asked_for_is_not_inflated(path):
    npz.write(path, ARRAYS)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("junk.npy", header((1 << 26,)) + bytes(1 << 26))
    tracemalloc.start()
    npz.read(path, "image", what="file")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header((10**12, 8)), "its header says uint8 [1000000000000, 8], which it does not hold"),
        (header((-2, -24)) + bytes(48), "which it does not hold"),
        (header((48,)) + bytes(47), "which it does not hold"),
        (header((48,)) + bytes(49), "which it does not hold"),
        (header("(" + "-" * 5000 + "1,)"), "Header info length"),
        (header("(" + "-" * 300 + "1,)"), "image"),
        (header((1,), "|O") + bytes(8), "pickled"),
        (header("'none'"), "image"),
        (b"hello", "image"),
        (b"", "image"),
        (b"\x93NUMPY\x07\x00", "format 7.0 is not read"),
    ],
)
def test_headers_that_lie_are_refused_before_memory_is_taken(data, message, path):
    with_member(path, data)
    tracemalloc.start()
    assert message in refused(path, "image")
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_an_array_that_inflates_beyond_reason_is_refused(path, monkeypatch):
    monkeypatch.setattr(npz, "INFLATED", 1 << 20)
    with_member(path, header((1 << 24,)) + bytes(1 << 24), compression=zipfile.ZIP_DEFLATED)
    assert "would inflate to" in refused(path, "image")


def test_damage_below_the_zip_directory_is_one_line(path):
    np.savez_compressed(path, **ARRAYS)
    whole = path.read_bytes()
    start = 30 + sum(struct.unpack("<HH", whole[26:30]))
    damaged = bytearray(whole)
    damaged[start] ^= 0x06
    encrypted = bytearray(whole)
    encrypted[6] |= 1
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1
    method = whole.replace(b"\x00\x00\x08\x00", b"\x00\x00\x63\x00")
    for data in (damaged, encrypted, method, whole[:-1], b"PK\x05\x06" + bytes(18)):
        path.write_bytes(data)
        refused(path, "image", "count")


def test_a_folder_or_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of tests"):
        npz.read(tmp_path / "missing", "image", what="file of tests")
    with pytest.raises(OSError, match="directory"):
        npz.read(tmp_path, "image", what="file")


@pytest.mark.parametrize("value", [np.arange(3), np.asarray(np.inf), np.asarray("3"), -1, 0])
def test_a_whole_number_is_one(value):
    with pytest.raises(ValueError, match="x must be one whole number of at least 1, got"):
        npz.whole_number(np.asarray(value), where="x", at_least=1)
    assert npz.whole_number(np.asarray(3), where="x") == 3


@pytest.mark.parametrize("held", [npz.HELD, 0])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "count",
    [
        150,
        pytest.param(5000, marks=pytest.mark.slow),
    ],
)
def test_mutated_files_of_samples_are_read_or_refused(save, count, held, path, monkeypatch):
    """Any other exception, and any warning, fails the test."""
    monkeypatch.setattr(npz, "HELD", held)
    image = np.random.default_rng(1).integers(0, 99, (3, 2, 2, 1)).astype(np.uint8)
    buffer = io.BytesIO()
    text = np.asarray('{"seed": 1, "sampling": {}}')
    save(buffer, arr_0=image, label=np.arange(3), num_classes=np.asarray(3), metadata=text)
    whole, rng, refusals = buffer.getvalue(), np.random.default_rng(0), []
    for _ in range(count):
        data = bytearray(whole)
        for where in rng.integers(0, len(data), rng.integers(1, 4)):
            data[where] = rng.integers(0, 256)
        path.write_bytes(data[: rng.choice([len(data), rng.integers(len(data))], p=[0.9, 0.1])])
        try:
            samples.read_samples(path)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > count // 3 and not any("\n" in line for line in refusals)
    assert os.listdir(path.parent) == ["arrays.npz"]
