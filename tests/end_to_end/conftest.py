"""One tiny run, trained to its end without a stop, that the tests compare with and sample from."""

import contextlib
import fcntl
import os
import pathlib
import shutil

import jax
import pytest
import tiny

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


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> pathlib.Path:
    """Never to be written to: copy it with `copy_of`. The first worker to need it trains it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    workdir = shared / "finished" / "run"
    workdir.parent.mkdir(exist_ok=True)
    with patched_devices(), open(shared / "finished.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert training.train(tiny.config(), workdir)  # returns at once where it is complete
    return workdir


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
