"""A run goes on with other devices and processes than it began with, to the same end."""

import shutil

import hosts
import numpy as np
import pytest
import tiny

from arcond_jax.run import restoring

LAYOUTS = {
    "one process": dict(count=1, devices=8),
    "four devices": dict(count=1, devices=4, more=("mesh.fsdp=4",)),
    "1x2x2": dict(count=1, devices=4, more=("mesh.fsdp=2", "mesh.tensor=2")),
    "four processes of two": dict(count=4, devices=2),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps by two processes of four devices, with a bank and a calibrated refiner; samples."""
    workdir = tmp_path_factory.mktemp("elastic") / "run"
    hosts.run(*hosts.train_arguments(workdir))
    hosts.run("calibrate", "--checkpoint", workdir)
    return workdir, sampled(workdir)


def sampled(workdir, *flags, **how):
    out = workdir.parent / "samples.npz"
    arguments = ["sample", "--checkpoint", workdir, "--num_images", 16, "--out", out, *flags]
    hosts.run(*arguments, **how)
    return np.load(out)["arr_0"].astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_hosts_go_on_with_it(layout, whole, tmp_path):
    expected, images = whole
    how = dict(LAYOUTS[layout])
    more, workdir = how.pop("more", ()), tmp_path / "run"
    shutil.copytree(expected, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    shutil.rmtree(workdir / "bank")
    hosts.run(*hosts.train_arguments(workdir, *more), **how)
    hosts.assert_same_rows(hosts.rows(workdir), hosts.rows(expected))
    here = tiny.config()  # on the devices of the tests
    ours, theirs = (restoring.restore(x, config=here).bank for x in (workdir, expected))
    np.testing.assert_array_equal(ours.count, theirs.count)  # each image once
    np.testing.assert_allclose(ours.atoms, theirs.atoms, rtol=1e-3, atol=1e-4)
    flags = [f"--config.{x}" for x in more]
    assert np.abs(sampled(workdir, *flags, **how) - images).max() <= 1
