"""Laws of a run: stopped, killed or moved to another mesh, it gives the numbers of one that ran on.

Also the bank, filled at the end, and the refiner that is calibrated from it.
"""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from arcond_jax import build, checkpoint
from arcond_jax import config as config_lib
from arcond_jax.build import saved as saved_lib
from arcond_jax.cli import main
from arcond_jax.run import drawing, exclusive, initial, refinement, restoring, training
from arcond_jax.training import loop, rates, writer
from arcond_jax.training import state as state_lib
from arcond_jax.transport import refiners

# Stands in for the machine's own timing: the signal comes while this batch is taken.
KILLED = """
import os, signal, sys
import jax
from arcond_jax.cli import main
from arcond_jax.run import training
one = jax.devices()[:1]
jax.devices = lambda: one
take, count = training._Batches.__next__, 0
def interrupting(batches):
    global count
    count += 1
    if count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(batches)
training._Batches.__next__ = interrupting
sys.exit(main.main(sys.argv[1:]))
"""


def train_arguments(workdir):
    arguments = ["train", "--config", "digits:joint", "--workdir", str(workdir)]
    return [*arguments, *(f"--config.{override}" for override in tiny.overrides())]


def interrupt(patched, *, at_batch, number=signal.SIGTERM):
    """A signal comes in this process, while a batch is taken."""
    take, count = training._Batches.__next__, itertools.count(1)

    def interrupting(batches):
        if next(count) == at_batch:
            os.kill(os.getpid(), number)
        return take(batches)

    patched.setattr(training._Batches, "__next__", interrupting)


@functools.cache
def abstract_state():
    return build.abstract_state(tiny.config())


def saved_state(workdir):
    with checkpoint.Checkpoints(str(workdir / "checkpoints")) as checkpoints:
        abstract = state_lib.abstract_on(abstract_state(), build.mesh(tiny.config()))
        return checkpoints.restore(abstract).state


def rows_without_time(workdir):
    rows = writer.read_rows(workdir / "metrics.jsonl")
    return [{name: x for name, x in row.items() if name not in rates.NAMES} for row in rows]


def assert_same_run(workdir, expected):
    assert rows_without_time(workdir) == rows_without_time(expected)
    state, wanted = saved_state(workdir), saved_state(expected)
    assert int(state.step) == tiny.config().training.num_train_steps
    jax.tree.map(np.testing.assert_array_equal, state, wanted)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_stopped_by_a_signal_and_resumed_is_uninterrupted(
    number, finished, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        interrupt(patched, at_batch=3, number=number)
        assert main.main(train_arguments(workdir)) == 75
    assert f"stopped and saved: {workdir}" in capsys.readouterr().out
    assert [row["step"] for row in writer.read_rows(workdir / "metrics.jsonl")] == [1, 2, 3]
    assert int(saved_state(workdir).step) == 3

    def gone(*_, **__):  # what reads the lines of progress has ended, as `tee` by the same Ctrl-C
        raise BrokenPipeError

    monkeypatch.setattr(loop, "print", gone, raising=False)
    assert training.train(tiny.config(), workdir)
    assert_same_run(workdir, finished)


@pytest.mark.long
def test_a_picture_that_cannot_be_written_costs_no_step(tmp_path, caplog):
    def show(*_):
        raise FileExistsError("samples is a file")

    config = tiny.config("base")
    config.training.update(samples_every=1, num_train_steps=2)
    assert training.train(config, tmp_path / "run", show=show)
    assert "no samples of step 1: samples is a file" in caplog.text
    caplog.set_level("INFO")
    assert training.train(config, tmp_path / "run", start_from=initial.Initial("nothing"))
    assert "goes on: --init is not read again" in caplog.text


@pytest.mark.slow
def test_killed_and_restarted_is_uninterrupted(finished, tmp_path):
    workdir = tmp_path / "run"
    arguments = [sys.executable, "-c", KILLED, *train_arguments(workdir)]
    killed = subprocess.run(arguments, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert int(saved_state(workdir).step) in (2, 4)  # 4 only if its files were whole by then
    assert training.train(tiny.config(), workdir)
    assert_same_run(workdir, finished)


@pytest.mark.slow
def test_resuming_on_other_meshes_continues_the_curve(finished, copy_of, monkeypatch):
    workdir = copy_of(finished, last_step=2)
    (workdir / "metrics.jsonl").write_text("")
    with monkeypatch.context() as patched:
        eight = jax.local_devices()
        patched.setattr(jax, "devices", lambda: eight)
        interrupt(patched, at_batch=2)
        assert not training.train(tiny.config(), workdir)  # steps 3 and 4 on eight devices
        state = saved_state(workdir)
        assert int(state.step) == 4
        assert len(state.params["final_norm"]["scale"].sharding.device_set) == 8
    assert training.train(tiny.config(), workdir)  # steps 5 and 6 on one
    log, expected = rows_without_time(workdir), rows_without_time(finished)[2:]
    assert [row["step"] for row in log] == [3, 4, 5, 6]
    for name in ("loss", "gradient_norm"):
        # Sums run in another order: a few float32 roundings (1.2e-7) apart.
        np.testing.assert_allclose(
            [row[name] for row in log], [row[name] for row in expected], rtol=3e-6
        )


def test_a_completed_run_returns_at_once(finished, copy_of, monkeypatch):
    def unexpected(*_):
        raise AssertionError("a step was compiled")

    workdir = copy_of(finished)
    before = (workdir / "metrics.jsonl").read_text()
    monkeypatch.setattr(build, "train_step", unexpected)
    assert training.train(tiny.config(), workdir)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_stopped_while_the_bank_is_filled_nothing_is_lost(finished, copy_of, monkeypatch):
    workdir = copy_of(finished)
    for folder in (workdir / "bank").iterdir():
        shutil.rmtree(folder)
    filled_bank = refinement.filled_bank
    with monkeypatch.context() as patched:

        def stopped(trained):
            os.kill(os.getpid(), signal.SIGTERM)
            return filled_bank(trained)

        patched.setattr(refinement, "filled_bank", stopped)
        assert not training.train(tiny.config(), workdir)
    assert int(saved_state(workdir).step) == 6


def test_a_second_run_in_a_working_directory_is_refused(tmp_path):
    workdir = epath.Path(tmp_path)
    second = exclusive.only_run(workdir)
    with exclusive.only_run(workdir), pytest.raises(build.ConfigError, match="another run"):
        second.__enter__()
    with exclusive.only_run(workdir):
        pass  # free again


@pytest.mark.slow
def test_a_run_restarts_from_an_earlier_step_at_another_rate(finished, copy_of):
    workdir = copy_of(finished)
    slower = tiny.config("joint", "training.learning_rate=1e-3", "training.clip_norm=0.5")
    assert training.train(slower, workdir, restart_from=2)
    rows = writer.read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["learning_rate"] == pytest.approx(1e-3)
    none = tiny.config("joint", "training.clip_norm=None")
    with pytest.raises(build.ConfigError, match="may change, but not come or go"):
        training.train(none, workdir, restart_from=2)


def test_a_bank_of_another_shape_does_not_spoil_a_run(finished):
    """The bank is apart from the state: it is filled anew where the config asks for another."""
    config = tiny.config("joint", "transport.num_atoms=16")
    assert restoring.restore(finished, config=config).bank is None
    assert restoring.restore(finished).bank is not None


def test_a_refiner_that_cannot_be_written_leaves_the_earlier_one(calibrated, monkeypatch):
    trained, folder, refiner = calibrated

    def killed(*_):
        raise checkpoint.CheckpointError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_tree", killed)
        with pytest.raises(checkpoint.CheckpointError):
            refinement.save_refiner(trained, folder, trained.config, refiner)
    refinement.load_refiner(trained, folder, trained.config)


def test_what_a_run_writes(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config_lib.flat(saved_lib.load(config)) == config_lib.flat(tiny.config())
    written = {path.name for path in finished.iterdir()} - {"classifier.npz"}  # of an evaluation
    assert written == {".lock", "bank", "checkpoints", "config.json", "metrics.jsonl", "tokenizer"}
    rows = rows_without_time(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "loss_diffusion", "loss_tensor", "learning_rate"} <= rows[0].keys()


def test_the_bank_is_filled_when_training_completes(finished):
    config = tiny.config()
    before, after = restoring.restore(finished, step=4), restoring.restore(finished)
    assert before.bank is None
    label = build.source(config, "train").label
    images_per_class = np.bincount(label, minlength=10)
    np.testing.assert_array_equal(after.bank.count, np.tile(images_per_class, (16, 1)))
    written = np.any(np.asarray(after.bank.atoms) != 0.0, axis=-1).sum(axis=-1)
    np.testing.assert_array_equal(
        written, np.tile(np.minimum(images_per_class, config.transport.num_atoms), (16, 1))
    )

    # The atoms of a class are the conditions of its last images.
    cond, of_label = refinement.conditions(after, "train")
    last = cond[of_label == 7][-32:, 5]
    np.testing.assert_allclose(
        np.sort(np.asarray(after.bank.atoms[5, 7]), axis=0), np.sort(last, axis=0), atol=1e-5
    )


@pytest.fixture(scope="module")
def calibrated(finished, tmp_path_factory):
    """The trained model, a folder with its calibrated refiner, and the refiner itself."""
    trained, folder = restoring.restore(finished), tmp_path_factory.mktemp("calibrated")
    refiner = refinement.calibrate(trained)
    refinement.save_refiner(trained, folder, trained.config, refiner)
    return trained, folder, refiner


def test_a_refiner_on_disk_is_the_one_calibrated(calibrated):
    trained, folder, refiner = calibrated
    loaded = refinement.load_refiner(trained, folder, trained.config)
    jax.tree.map(np.testing.assert_array_equal, loaded, refiner)
    drawer, label = drawing.Drawer(trained), np.arange(16, dtype=np.int32) % 10
    images = [drawer.images(r, label, seed=0) for r in (refiner, loaded)]
    np.testing.assert_array_equal(*images)
    assert np.any(images[0] != drawer.images(refiners.Identity(), label, seed=0))


def test_a_refiner_takes_the_place_of_the_earlier_one(calibrated, tmp_path):
    trained, _, refiner = calibrated
    for _ in range(2):
        refinement.save_refiner(trained, tmp_path, trained.config, refiner)
    assert [x.name for x in (tmp_path / "refiner").iterdir()] == ["2"]
    refinement.load_refiner(trained, tmp_path, trained.config)


RESIDUAL = ("transport.kind=residual", "transport.num_directions=5")


def test_a_refiner_of_residuals_fills_its_own_bank(finished):
    trained = restoring.restore(finished, config=tiny.config("joint", *RESIDUAL))
    bank = refinement.filled_bank(trained)
    cond, label = refinement.conditions(trained, "train")
    mean = np.stack([cond[label == group].mean(axis=0) for group in range(10)], axis=1)
    expected = np.einsum("sgd,sdk->sgk", mean, bank.basis)
    np.testing.assert_allclose(bank.mean, expected, atol=1e-4)


@pytest.mark.slow
def test_a_bank_of_residuals_of_one_group_is_not_that_of_many(finished, tmp_path):
    """One of a single group, and of more atoms than images, fits its config but not this one."""
    config, config_of_one_group = (
        tiny.config("joint", *RESIDUAL),
        (*RESIDUAL, "transport.grouping=shared"),
    )
    trained = restoring.restore(finished, config=config)
    num_images = len(build.source(config, "train"))
    other = tiny.config("joint", *config_of_one_group, f"transport.num_atoms={num_images + 3}")
    shared = refinement.filled_bank(dataclasses.replace(trained, config=other))
    assert shared.atoms.shape[1] == num_images + 3
    assert int(shared.count[0, 0]) == num_images
    shared = refinement.filled_bank(
        dataclasses.replace(trained, config=tiny.config("joint", *config_of_one_group))
    )
    refiner = refinement.calibrate(dataclasses.replace(trained, bank=shared))
    assert refiner.maps.shift.shape[1] == 10

    refinement.save_refiner(trained, tmp_path, config, refiner)
    loaded = refinement.load_refiner(trained, tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, refiner)
    drawer, label = drawing.Drawer(trained), np.arange(16, dtype=np.int32) % 10
    refined, plain = (drawer.images(r, label, seed=0) for r in (loaded, refiners.Identity()))
    assert np.any(refined != plain)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.code_temperature=0.5", r"with sampling\.code_temperature=1\.0, not 0\.5"),
        ("transport.tau=3.0", r"with transport\.tau=1\.0, not 3\.0"),
        ("transport.kind=bures", r"with transport\.kind=stored, not bures"),
    ],
)
def test_a_refiner_for_another_sampler_is_refused(calibrated, override, message):
    trained, folder, _ = calibrated
    with pytest.raises(build.ConfigError, match=message) as raised:
        refinement.load_refiner(trained, folder, tiny.config("joint", override))
    assert "\n" not in str(raised.value)


def test_a_refiner_older_than_a_setting_has_its_default(calibrated, monkeypatch):
    trained, folder, _ = calibrated
    load, name = checkpoint.load_metadata, "transport.max_move"
    monkeypatch.setattr(
        checkpoint, "load_metadata", lambda path: {k: v for k, v in load(path).items() if k != name}
    )
    refinement.load_refiner(trained, folder, trained.config)
    with pytest.raises(build.ConfigError, match=r"max_move=3\.0, not 5\.0"):
        refinement.load_refiner(trained, folder, tiny.config("joint", f"{name}=5"))


def test_a_refiner_of_another_step_is_refused(calibrated, finished):
    trained, folder, _ = calibrated
    with pytest.raises(build.ConfigError, match="with checkpoint step=6, not 4"):
        refinement.load_refiner(restoring.restore(finished, step=4), folder, trained.config)


def test_the_tokenizer_lies_once_beside_the_checkpoints(finished, copy_of):
    workdir = copy_of(finished)
    steps = list((workdir / "checkpoints").iterdir())
    assert not [step for step in steps if (step / "tokenizer").exists()]
    shutil.rmtree(workdir / "tokenizer")
    other = dataclasses.replace(restoring.restore(finished).tokenizer, mean=np.ones(4, np.float32))
    restoring.keep_tokenizer(workdir, other)
    with pytest.raises(checkpoint.CheckpointError, match="is not the tokenizer that the checkp"):
        restoring.restore(workdir)
    shutil.rmtree(workdir / "tokenizer")
    with pytest.raises(checkpoint.CheckpointError, match="tokenizer does not exist"):
        restoring.restore(workdir)


def test_a_run_that_is_not_finite_is_not_sampled_from(finished, copy_of):
    """An average with a NaN would draw one picture for all, without an error."""
    workdir, config = copy_of(finished), tiny.config()
    with checkpoint.Checkpoints(f"{workdir}/checkpoints", every=1) as checkpoints:
        saved = checkpoints.config()
        run = restoring.read_run(workdir, checkpoints, config, saved, build.mesh(config))
        broken = jax.tree.map(
            lambda x: jax.device_put(np.full(x.shape, np.nan, x.dtype), x.sharding), run.state.ema
        )
        checkpoints.save(
            run.step + 1,
            state=run.state.replace(ema=broken),
            tokenizer=run.tokenizer,
            data=run.data,
            config=saved,
        )
    message = f"{workdir} at step 7 holds weights that are not finite, in .* and .* more"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        restoring.restore(workdir)
