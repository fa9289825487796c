"""A run in a bucket is the run on a disk: trained, stopped, gone on with, sampled from.

tensorstore reads and writes it by its own driver for Google Cloud Storage; all else goes by gcsfs
where that is installed (`pip install -e '.[gcs]'`), and else by what stands for it.
"""

import json
import time

import bucket
import jax
import numpy as np
import pytest
import tiny
import toy_network
from etils import epath
from test_run import interrupt, rows_without_time

from arcond_jax import build, checkpoint
from arcond_jax.cli import main
from arcond_jax.evaluation import image_sets, reference, samples
from arcond_jax.run import exclusive, restoring, training
from arcond_jax.training import writer

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def server():
    with bucket.in_reach() as reached:
        yield reached


@pytest.fixture
def impatient(monkeypatch):
    make_impatient(monkeypatch)


def make_impatient(patched):
    for name, seconds in (("BEAT", 0.1), ("DEAD", 0.5), ("SETTLED", 0.05)):
        patched.setattr(exclusive, name, seconds)


@pytest.fixture(scope="module")
def run():
    """Stopped at its third step, gone on with, and complete."""
    workdir = epath.Path("gs://bucket/runs/digits")
    with pytest.MonkeyPatch.context() as patched:
        make_impatient(patched)
        interrupt(patched, at_batch=3)
        assert not training.train(tiny.config(), workdir)
    # As a killed process leaves it: begun, and not committed.
    (workdir / "checkpoints" / "5" / "state").joinpath("d").write_text("half")
    (workdir / "bank" / "6").joinpath("d").write_text("half")
    with pytest.MonkeyPatch.context() as patched:
        make_impatient(patched)
        assert training.train(tiny.config(), workdir)
    return workdir


def test_stopped_and_gone_on_with_it_is_the_run_on_a_disk(run, finished):
    assert rows_without_time(run) == rows_without_time(finished)
    here, there = (restoring.restore(x) for x in (run, finished))
    jax.tree.map(np.testing.assert_array_equal, here.params, there.params)
    jax.tree.map(np.testing.assert_array_equal, here.bank, there.bank)
    assert json.loads((run / "config.json").read_text())
    assert not (run / exclusive.LOCK).exists()


def test_what_must_be_on_this_machine_is_refused(capsys):
    sample = ["sample", "--checkpoint", "gs://bucket/runs/digits", "--out", "gs://bucket/s.npz"]
    with pytest.raises(SystemExit, match="2"):
        main.main([*sample, "--png_dir", "gs://bucket/images"])
    error = capsys.readouterr().err
    assert "gs://bucket/images lies in a bucket: name one on this machine" in error


@pytest.mark.slow
def test_it_is_calibrated_and_sampled_there(run, capsys):
    out, sheet = "gs://bucket/drawn.npz", "gs://bucket/drawn.png"
    sample = ["sample", "--checkpoint", str(run), "--num_images", "4", "--out", out]
    assert main.main(["calibrate", "--checkpoint", str(run)]) == 0
    assert main.main([*sample, "--png", sheet]) == 0
    assert f"4 images: {out}" in capsys.readouterr().out
    assert samples.read_samples(out).image_uint8.shape == (4, 8, 8, 1)
    assert epath.Path(sheet).read_bytes().startswith(b"\x89PNG")
    assert main.main(["evaluate", "--samples", out, "--checkpoint", str(run)]) == 0
    assert json.loads(epath.Path("gs://bucket/drawn.card.json").read_text())["measurements"]


def test_a_reference_lies_there_too(run):
    network = toy_network.make(pixels=8 * 8)
    image = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    made = reference.measure(image_sets.Array(image), network)
    path = epath.Path("gs://bucket/reference.npz")
    reference.write(path, made)
    assert epath.Path("gs://bucket/reference.card.json").exists()
    np.testing.assert_array_equal(reference.read(path, network).rows, made.rows)


def test_a_first_checkpoint_that_was_never_whole_is_begun_again(impatient):
    workdir = epath.Path("gs://bucket/runs/killed")
    (workdir / "checkpoints" / "0" / "state" / "d").write_text("half")
    assert not checkpoint.has_steps(f"{workdir}/checkpoints")


def test_rows_are_kept_when_a_file_is_opened_again():
    path = epath.Path("gs://bucket/rows/metrics.jsonl")
    for step in (1, 2, 3):
        lines = writer.JsonLines(path, resume_at=step)
        lines.write_scalars(step, {"loss": 0.5})
        lines.flush()
        assert [row["step"] for row in writer.read_rows(path)] == [*range(1, step + 1)]
        lines.close()


def test_a_second_run_in_a_bucket_is_refused_and_the_first_unharmed(impatient):
    workdir = epath.Path("gs://bucket/runs/locked")
    with exclusive.only_run(workdir):
        held = json.loads((workdir / exclusive.LOCK).read_text())
        with (
            pytest.raises(build.ConfigError, match=f"another run is .*{held['holder']}"),
            exclusive.only_run(workdir),
        ):
            pass
        time.sleep(0.3)
        now = json.loads((workdir / exclusive.LOCK).read_text())
        assert now["id"] == held["id"] and now["beat"] > held["beat"]
    assert not (workdir / exclusive.LOCK).exists()


def test_the_lock_of_a_run_that_died_gives_way(impatient):
    workdir = epath.Path("gs://bucket/runs/died")
    lock = workdir / exclusive.LOCK
    lock.write_text(json.dumps({"id": "of another", "holder": "process 1 on elsewhere", "beat": 7}))
    began = time.monotonic()
    with exclusive.only_run(workdir):
        assert time.monotonic() - began >= exclusive.DEAD
        assert json.loads(lock.read_text())["id"] != "of another"


def test_of_two_that_start_at_once_one_goes_on(monkeypatch, impatient):
    workdir = epath.Path("gs://bucket/runs/both")
    write = exclusive.atomic.write_text

    def overtaken(path, text):
        write(path, text)
        write(path, json.dumps({"id": "of another", "holder": "process 1 on elsewhere", "beat": 0}))

    monkeypatch.setattr(exclusive.atomic, "write_text", overtaken)
    with (
        pytest.raises(build.ConfigError, match="process 1 on elsewhere"),
        exclusive.only_run(workdir),
    ):
        pass
    assert (workdir / exclusive.LOCK).exists()  # the other's
