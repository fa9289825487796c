"""One tiny run, trained to its end without a stop, that the tests compare with and sample from."""

import contextlib
import fcntl
import os
import pathlib
import shutil

import jax
import pytest
import tiny

from arcond_jax.data import digits
from arcond_jax.evaluation import classifier
from arcond_jax.run import training


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Runs see one of the eight devices: a program for one compiles in half the time."""
    with patched_devices():
        yield


@contextlib.contextmanager
def patched_devices():
    one = jax.local_devices()[:1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "devices", lambda: one)
        yield


def shared(tmp_path_factory, name: str, config) -> pathlib.Path:
    """A run never to be written to. The first worker to need it trains it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    workdir = folder / name / "run"
    workdir.parent.mkdir(exist_ok=True)
    with patched_devices(), open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert training.train(config, workdir)  # returns at once where it is complete
    return workdir


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> pathlib.Path:
    """Never to be written to: copy it with `copy_of`."""
    return shared(tmp_path_factory, "finished", tiny.config())


@pytest.fixture(scope="session")
def scored(tmp_path_factory) -> pathlib.Path:
    """The same of one that is scored while it trains, so that it has a classifier."""
    return shared(tmp_path_factory, "scored", tiny.scored_config())


@pytest.fixture
def copy_of(tmp_path):
    """Copies a workdir; `last_step` drops later checkpoints, as if the run had stopped there."""

    def copy(workdir, last_step=None):
        target = tmp_path / "copy"
        shutil.copytree(workdir, target)
        for folder in (target / "checkpoints").iterdir():
            if last_step is not None and int(folder.name) > last_step:
                shutil.rmtree(folder)
        return target

    return copy


@pytest.fixture(scope="session")
def quick_classifier() -> classifier.Classifier:
    """Of digits, trained for a moment."""
    source = digits.Digits("train")
    return classifier.train_classifier(
        source.image, source.label, num_classes=10, num_train_steps=50
    )
