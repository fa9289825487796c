"""Data in a bucket are copied once, whole, and again when they are others; a bucket in memory."""

import os
import typing

import fsspec
import fsspec.implementations.memory
import photographs
import pytest

from arcond_jax import build
from arcond_jax.data import copies
from arcond_jax.run import preparing

LARGE = os.urandom(copies.DESCRIPTION_BYTES + 1)


@pytest.fixture
def bucket():
    """A bucket without its network: fsspec's own file system in memory, by the name of Google's."""
    fsspec.register_implementation("gcs", Memory, clobber=True)
    Memory.reads = []
    fs = Memory()
    fs.store.clear()
    yield fs
    fs.store.clear()


class Memory(fsspec.implementations.memory.MemoryFileSystem):
    reads: typing.ClassVar[list[str]] = []
    protocol = ("gcs", "gs")

    def _open(self, path, mode="rb", **more):
        if mode == "rb":
            self.reads.append(path.rpartition("/")[2])
        return super()._open(path, mode, **more)


def local(tmp_path, max_bytes=10**9):
    return copies.local("gs://bucket/data", copies=tmp_path / "copies", max_bytes=max_bytes)


def test_a_folder_is_copied_once(bucket, tmp_path):
    bucket.pipe({"gs://bucket/data/a.array_record": LARGE, "gs://bucket/data/manifest.json": b"1"})
    bucket.pipe({"gs://bucket/data/progress/0.json": b"not needed"})
    bucket.pipe({"gs://bucket/data/tokenizer/deep/b": b"of a cache"})
    copy = local(tmp_path)
    assert sorted(os.listdir(copy)) == ["a.array_record", "manifest.json", "tokenizer"]
    assert (copy / "tokenizer" / "deep" / "b").read_bytes() == b"of a cache"
    assert (copy / "a.array_record").read_bytes() == LARGE
    bucket.reads.clear()
    assert local(tmp_path) == copy
    assert bucket.reads == ["manifest.json", "b"]


def test_a_cut_off_file_is_copied_again_and_so_is_everything_of_another_manifest(bucket, tmp_path):
    bucket.pipe({"gs://bucket/data/a.array_record": LARGE, "gs://bucket/data/manifest.json": b"1"})
    copy = local(tmp_path)
    (copy / "a.array_record").write_bytes(LARGE[:-1])
    assert (local(tmp_path) / "a.array_record").read_bytes() == LARGE
    other = LARGE[::-1]  # of the same size
    bucket.pipe({"gs://bucket/data/a.array_record": other, "gs://bucket/data/manifest.json": b"2"})
    assert (local(tmp_path) / "a.array_record").read_bytes() == other
    assert (copy / "manifest.json").read_bytes() == b"2"


def test_a_failed_read_is_blamed_on_what_is_read_and_leaves_nothing(bucket, tmp_path, monkeypatch):
    bucket.pipe({"gs://bucket/data/a.array_record": LARGE})

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "read", fail)
    with pytest.raises(
        OSError, match=r"^gs://bucket/data/a\.array_record cannot be read: Input/ou"
    ):
        local(tmp_path)
    assert not [path for path in (tmp_path / "copies").rglob("*") if path.is_file()]


def test_what_is_not_there_or_too_large_is_refused(bucket, tmp_path):
    with pytest.raises(ValueError, match="gs://bucket/data does not exist"):
        local(tmp_path)
    bucket.pipe({"gs://bucket/data/a.array_record": LARGE})
    with pytest.raises(ValueError, match=r"holds 0\.00105 GB, more than the 0\.001 GB of"):
        local(tmp_path, max_bytes=10**6)
    assert not (tmp_path / "copies").exists()


def test_records_in_a_bucket_are_those_of_the_folder(bucket, tmp_path):
    prepared = tmp_path / "prepared"
    preparing.prepare([photographs.write_folder(tmp_path / "unpacked")], prepared)
    for path in prepared.rglob("*"):
        if path.is_file():
            bucket.pipe(f"gs://bucket/data/{path.relative_to(prepared)}", path.read_bytes())
    settings = ["data.image_size=16", "data.num_classes=3", "data.name=records"]

    def source(*more):
        return build.source(build.load_config("magvit2_b", [*settings, *more]), "train")

    there = source("data.directory=gs://bucket/data", f"data.copies={tmp_path / 'copies'}")
    here = source(f"data.directory={prepared}")
    assert photographs.items(there) == photographs.items(here)
    assert there.label_names == here.label_names
    with pytest.raises(ValueError, match=r"data\.max_copy_gb: raise that"):
        source("data.directory=gs://bucket/data", "data.max_copy_gb=1e-6")
    with pytest.raises(build.ConfigError, match="is a bucket, too slow for files of one image"):
        source("data.directory=gs://bucket/data", "data.name=folder")
