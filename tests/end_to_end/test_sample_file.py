"""Samples on their way to a file: stopped at any moment, even by force, they come out the same."""

import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from arcond_jax.cli import main
from arcond_jax.evaluation import part, samples
from arcond_jax.run import drawing, evaluating, exclusive, progress, sample_file

pytestmark = pytest.mark.long

PLAIN = "--config.transport.kind=none"


def arguments(workdir, out, *more, count=40, batch_size=4):
    flags = ["--num_images", count, "--batch_size", batch_size, "--out", out, PLAIN]
    return [str(x) for x in ("sample", "--checkpoint", workdir, *flags, *more)]


def sample(*given, **options):
    assert main.main(arguments(*given, **options)) == 0


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """Never stopped."""
    out = tmp_path_factory.mktemp("whole") / "out.npz"
    sample(finished, out)
    return out.read_bytes()


@pytest.fixture(scope="module")
def left(finished, tmp_path_factory):
    """What three batches leave; what stops it is what a full disk raises. Never to be changed."""
    out, add = tmp_path_factory.mktemp("left") / "out.npz", part.Part.add

    def third(self, image_uint8):
        if self.num_rows == 12:
            raise OSError("no space")
        add(self, image_uint8)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(part.Part, "add", third)
        assert main.main(arguments(finished, out)) == 2
    assert [x.name for x in out.parent.iterdir()] == ["out.npz.part"]
    return part.path_of(out)


@pytest.fixture
def stopped(left, tmp_path):
    """The file of a run that was stopped after three batches."""
    out = tmp_path / "out.npz"
    shutil.copytree(left, part.path_of(out))
    return out


def killed(given, folder, num_files):
    """Runs a command as a program, and kills it once a folder has as many files."""
    with subprocess.Popen([sys.executable, "-m", "arcond_jax", *given]) as program:
        while len([*folder.glob("*")]) < num_files:
            assert program.poll() is None
            time.sleep(0.01)
        program.send_signal(signal.SIGKILL)
    assert program.returncode == -signal.SIGKILL


def test_killed_it_goes_on_to_the_same_bytes(finished, whole, tmp_path, caplog):
    out, pngs = tmp_path / "out.npz", tmp_path / "pngs"
    given = arguments(finished, out, "--png_dir", pngs)
    killed(given, part.path_of(out), 4)
    assert not out.exists() and not pngs.exists()
    caplog.set_level("INFO")
    assert main.main(given) == 0
    (said,) = re.findall(r"(\d+) images are there already", caplog.text)
    assert int(said) >= 8
    assert out.read_bytes() == whole
    image_uint8 = samples.read_samples(out).image_uint8
    read = [np.asarray(PIL.Image.open(path)) for path in sorted(pngs.iterdir())]
    np.testing.assert_array_equal(np.stack(read)[..., None], image_uint8)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out.npz", "pngs"]


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(finished, tmp_path):
    options = dict(count=3000, batch_size=20)
    sample(finished, tmp_path / "whole.npz", **options)
    out, pngs = tmp_path / "out.npz", tmp_path / "pngs"
    rng, folder = np.random.default_rng(), part.path_of(out)
    for _ in range(10):
        given = arguments(finished, out, "--png_dir", pngs, **options)
        killed(given, folder, len([*folder.glob("*")]) + rng.integers(1, 14))
    sample(finished, out, "--png_dir", pngs, **options)
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    image_uint8 = samples.read_samples(out).image_uint8
    read = [np.asarray(PIL.Image.open(path)) for path in sorted(pngs.iterdir())]
    np.testing.assert_array_equal(np.stack(read)[..., None], image_uint8)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out.npz", "pngs", "whole.npz"]


def test_nothing_that_is_there_is_drawn_again(finished, whole, stopped, monkeypatch, tmp_path):
    drawn, call = [], drawing.Drawer.__call__

    def counted(self, *given, first_row, **options):
        drawn.append(first_row)
        return call(self, *given, first_row=first_row, **options)

    monkeypatch.setattr(drawing.Drawer, "__call__", counted)
    given = arguments(finished, stopped, "--png_dir", tmp_path / "pngs")
    at = given.index("--batch_size")
    assert main.main(given[:at] + given[at + 2 :]) == 0  # of the batches that were begun with
    assert drawn == [*range(12, 40, 4)] and stopped.read_bytes() == whole
    assert len([*(tmp_path / "pngs").iterdir()]) == 40


def test_another_batch_may_go_on(finished, whole, stopped):
    """By the law that an image depends on its number alone; no more than a level apart."""
    sample(finished, stopped, batch_size=7)
    expected = stopped.with_name("whole.npz")
    expected.write_bytes(whole)
    images = [samples.read_samples(x).image_uint8.astype(int) for x in (stopped, expected)]
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "1"], "12 images of an unfinished run whose labels"),
        (["--num_images", "41"], "whose number of images is 40, here it is 41"),
        (["--config.sampling.code_temperature=0.5"], "whose code_temperature is 1.0"),
        (["--label", "3"], "whose labels"),
    ],
)
def test_other_settings_do_not_go_on(more, message, finished, stopped, capsys):
    more = [*more, "--labels", "drawn"] if "--seed" in more else more
    before = sorted(stopped.parent.rglob("*"))
    assert main.main(arguments(finished, stopped, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert sorted(stopped.parent.rglob("*")) == before


def test_labels_are_drawn_with_the_seed(finished, tmp_path):
    out = tmp_path / "out.npz"
    sample(finished, out, "--labels", "drawn", "--seed", 7, count=12)
    found = samples.read_samples(out)
    assert found.metadata["sampling"]["labels"] == "drawn"
    np.testing.assert_array_equal(found.label, evaluating.labels(12, 10, "drawn", seed=7))
    assert np.any(found.label != evaluating.labels(12, 10, "drawn", seed=0))
    assert np.any(found.label != np.arange(12) % 10)
    label = evaluating.labels(10_000, 10, "drawn", seed=3)
    np.testing.assert_array_equal(label[:50], evaluating.labels(50, 10, "drawn", seed=3))
    assert np.abs(np.bincount(label, minlength=10) - 1000).max() < 150  # 5 standard deviations


def test_a_second_run_of_a_file_is_refused(finished, whole, tmp_path, capsys):
    out = tmp_path / "out.npz"
    with exclusive.only_drawing(out):
        assert main.main(arguments(finished, out)) == 2
    error = capsys.readouterr().err
    assert "another run is drawing" in error and error.count("\n") == 1, error
    assert not [*tmp_path.iterdir()]
    sample(finished, out)
    assert out.read_bytes() == whole


def test_what_is_no_file_is_refused(finished, capsys):
    assert main.main(arguments(finished, "/dev/null")) == 2
    assert "--out /dev/null is no regular file: name one" in capsys.readouterr().err


def test_progress_says_rate_and_time_left(finished, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "EVERY", 0.0)
    sample(finished, tmp_path / "out.npz", count=12)
    assert re.search(r"8 of 12 images, \S+ a second, \S+ minutes left", caplog.text)
    assert "12 of 12" not in caplog.text


def test_a_sheet_shows_the_first_images():
    batches = [np.full((3, 2, 2, 1), i, np.uint8) for i in range(3)]
    assert sample_file._first(iter(batches), 4).max(axis=(1, 2, 3)).tolist() == [0, 0, 0, 1]
    assert len(sample_file._first(iter(batches), 100)) == 9
