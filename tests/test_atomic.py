"""Files and folders are whole or absent, and what was there before stays until then."""

import os
import stat

import pytest

from arcond_jax import atomic


class StoppedError(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bad"), StoppedError()])
def test_a_failed_write_leaves_what_was_there(error, tmp_path):
    path = tmp_path / "card.json"
    atomic.write_text(path, "before")

    def write_half():
        with atomic.file(path) as opened:
            opened.write(b"half")
            opened.flush()
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["card.json"]


def test_a_new_file_has_the_rights_of_any_other(tmp_path):
    atomic.write_text(tmp_path / "ours", "é")
    (tmp_path / "other").touch()
    assert (tmp_path / "ours").read_bytes() == "é".encode()
    rights = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "other")]
    assert rights[0] == rights[1]


def test_links_are_followed_and_pipes_stay(tmp_path):
    (tmp_path / "target").write_text("before")
    (tmp_path / "link").symlink_to("target")
    atomic.write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "after"
    # A pipe of the test's own: a writer that got this wrong must not replace a device.
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    atomic.write_text(tmp_path / "pipe", "sent")
    assert os.read(reader, 9) == b"sent"
    # A name for a pipe that has none, as /dev/stdout is of one.
    (tmp_path / "link to pipe").symlink_to(f"/proc/self/fd/{os.open(tmp_path / 'pipe', os.O_RDWR)}")
    atomic.check(tmp_path / "link to pipe")
    atomic.write_text(tmp_path / "link to pipe", "also sent")
    assert os.read(reader, 9) == b"also sent"
    os.close(reader)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_errors_name_the_file_and_leave_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "missing" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(OSError, match=rf"^{path} cannot be written: [^\n]+$"):
            atomic.write_text(path, "text")
    assert os.listdir(tmp_path) == ["folder"]
    atomic.write_text(tmp_path / ("n" * 250), "text")  # the longest names are names


def test_a_place_is_looked_at_before_work(tmp_path):
    atomic.check(tmp_path / "new.json")
    atomic.check("gs://bucket/new.json")
    with pytest.raises(OSError, match=r"the folder of .*new\.json does not exist: create it first"):
        atomic.check(tmp_path / "missing" / "new.json")
    with pytest.raises(OSError, match="is a folder: name a file"):
        atomic.check(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_folder_appears_full_or_not_at_all(tmp_path):
    path = tmp_path / "above" / "folder"

    def fill_half():
        with atomic.folder(path) as made:
            (made / "0").touch()
            raise StoppedError

    with pytest.raises(StoppedError):
        fill_half()
    assert os.listdir(tmp_path / "above") == []
    path.mkdir()
    with atomic.folder(path) as made:
        (made / "1").touch()
        assert os.listdir(path) == []
    assert os.listdir(path) == ["1"]
    with pytest.raises(OSError, match="folder cannot be written"), atomic.folder(path) as made:
        (made / "2").touch()
    assert os.listdir(path) == ["1"] and os.listdir(tmp_path / "above") == ["folder"]
