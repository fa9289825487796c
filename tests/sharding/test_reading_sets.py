"""Two processes of four devices read a set as one process does: sums in another order, no more."""

import pathlib

import hosts
import jax
import numpy as np
import pytest

from arcond_jax.evaluation import features, image_sets, inception, summary
from arcond_jax.nn.inception import folded
from arcond_jax.parallel import mesh as mesh_lib

TOYS = pathlib.Path(__file__).parents[1]
READ = """
import argparse
import sys

import jax
import numpy as np

from arcond_jax.cli import joining
from arcond_jax.evaluation import features, image_sets, summary
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.parallel import processes

given = dict.fromkeys(("coordinator_address", "num_processes", "process_id", "config"))
joining.join(argparse.Namespace(**given, initialization_timeout=300, overrides=[]), [])
sys.path.insert(0, sys.argv[1])
import toy_network

features.BATCH_SIZE = 4
image, label = toy_network.images(99)
network = toy_network.make()
mesh = mesh_lib.make_mesh()
everywhere = processes.put(network, mesh_lib.replicated(mesh))
wanted = np.load(sys.argv[2])
for extractor, place in ((network, None), (everywhere, mesh)):
    halves = [(image[:50], label[:50]), (image[50:], label[50:])]
    for images in (image_sets.Array(image, label), halves):
        found = summary.summarise(images, extractor, mesh=place, num_classes=5)
        np.testing.assert_array_equal(found.rows, wanted["rows"])
        np.testing.assert_array_equal(found.label, label)
        for ours, name in (
            (found.features.mean, "mean"),
            (found.features.covariance, "covariance"),
            (found.spatial.covariance, "spatial"),
            (found.inception_score, "inception_score"),
        ):
            np.testing.assert_allclose(ours, wanted[name], rtol=1e-12, atol=1e-12)
        assert found.class_accuracy == wanted["class_accuracy"]
        assert found.features.count == 99
    few = summary.summarise(image_sets.Array(image[:3]), extractor, mesh=place)  # not for all
    np.testing.assert_array_equal(few.rows, wanted["rows"][:3])
print("done")
"""


@pytest.mark.long
def test_two_processes_are_as_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOYS)
    import toy_network

    monkeypatch.setattr(features, "BATCH_SIZE", 4)
    images = image_sets.Array(*toy_network.images(99))
    whole = summary.summarise(images, toy_network.make(), num_classes=5)
    np.savez(
        tmp_path / "whole.npz",
        rows=whole.rows,
        mean=whole.features.mean,
        covariance=whole.features.covariance,
        spatial=whole.spatial.covariance,
        inception_score=whole.inception_score,
        class_accuracy=whole.class_accuracy,
    )
    started = hosts.start(TOYS, tmp_path / "whole.npz", program=("-c", READ))
    codes, outputs, errors = hosts.ended(started)
    assert codes == [0, 0], errors
    assert outputs[0].endswith("done\n")


@pytest.mark.slow
def test_inception_on_eight_devices_is_as_on_one(monkeypatch):
    monkeypatch.setattr(features, "BATCH_SIZE", 2)
    rng = np.random.default_rng(0)
    abstract = inception.abstract_params()
    params = jax.tree.map(
        lambda x: 0.1 * rng.standard_normal(x.shape, np.float32) + (x.ndim == 1), abstract
    )
    network = inception.Inception(
        jax.jit(folded)(params), "tf", "float32", "ab" * 32, published=False
    )
    images = image_sets.Array(rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    mesh = mesh_lib.make_mesh()
    assert mesh.size == 8
    everywhere = jax.device_put(network, mesh_lib.replicated(mesh))
    one, eight = (
        summary.summarise(images, extractor, mesh=place)
        for extractor, place in ((network, None), (everywhere, mesh))
    )
    for ours, theirs in (
        (eight.features.mean, one.features.mean),
        (eight.features.covariance, one.features.covariance),
        (eight.spatial.mean, one.spatial.mean),
        (eight.spatial.covariance, one.spatial.covariance),
        (eight.inception_score, one.inception_score),
    ):
        close = 1e-12 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=close)
