"""Scores against a reference: their values, their names, and what cannot be measured."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import toy_network

from arcond_jax.evaluation import (
    frechet,
    image_sets,
    inception,
    kernel_distance,
    moments,
    precision_recall,
    scoring,
)
from arcond_jax.evaluation import reference as reference_lib

REAL = image_sets.Array(*toy_network.images(300, seed=1))
DRAWN = image_sets.Array(*toy_network.images(200, seed=2, high=200), {"file": "drawn.npz"})


@pytest.fixture(scope="module")
def network():
    return toy_network.make()


@pytest.fixture(scope="module")
def real(network):
    return reference_lib.measure(REAL, network, num_classes=toy_network.NUM_CLASSES)


def features(network, images):
    return np.asarray(network(images[0 : len(images)]).features)


def test_each_number_is_that_of_its_function(network, real):
    card = scoring.score(DRAWN, network, real, num_classes=toy_network.NUM_CLASSES)
    rows, real_rows = features(network, DRAWN), features(network, REAL)
    pair = moments.statistics(rows), moments.statistics(real_rows)
    kernel = kernel_distance.kernel_distance(rows, real_rows)
    shares = precision_recall.precision_recall(rows, real_rows, dtype="float32")
    found = card.measurements
    np.testing.assert_allclose(
        found["frechet_distance"], frechet.frechet_distance(*pair), rtol=1e-5
    )
    assert (found["precision"], found["recall"]) == shares
    np.testing.assert_allclose(found["kernel_distance"], kernel.mean, rtol=1e-4)
    assert 0.0 <= found["class_accuracy"] <= 1.0 <= found["inception_score"]
    assert found["class_frechet_distance"] > 0.0
    assert card.notes == ()
    assert card.samples == {
        "file": "drawn.npz",
        "images": 200,
        "image size": "4x4x3",
        "of each class": card.samples["of each class"],
    }
    assert card.reference == real.facts


def test_a_set_is_at_no_distance_from_itself(network, real):
    card = scoring.score(REAL, network, real)
    found = card.measurements
    assert found["frechet_distance"] == pytest.approx(0.0, abs=1e-6)
    assert found["spatial_frechet_distance"] == pytest.approx(0.0, abs=1e-6)
    assert (found["precision"], found["recall"]) == (1.0, 1.0)
    assert found["class_frechet_distance"] == pytest.approx(0.0, abs=1e-6)


def test_json_and_text_say_all(network, real):
    card = scoring.score(DRAWN, network, real, samples={"checkpoint step": 7})
    read = json.loads(card.as_json())
    assert read["measurements"] == card.measurements
    assert read["samples"]["checkpoint step"] == 7
    text = card.as_text()
    for words in ("drawn.npz", "random sums of pixels", "not FID: other features", "precision"):
        assert words in text


def test_without_labels_there_are_no_figures_by_class(network, real):
    card = scoring.score([(DRAWN[0:200], None)], network, real)
    assert card.notes == ("no figures by class: the samples have no labels",)
    assert not {"class_accuracy", "class_frechet_distance"} & card.measurements.keys()


def test_fewer_images_than_features_leave_what_remains(network, real):
    few = image_sets.Array(DRAWN[0:6])
    card = scoring.score(few, network, real)
    assert card.measurements.keys() == {
        "inception_score",
        "precision",
        "recall",
        "kernel_distance",
        "kernel_distance_deviation",
    }
    assert card.notes[0] == (
        "no frechet distance: 6 images are fewer than the 12 features, so their covariance is "
        "singular"
    )
    assert card.notes[-1].startswith("what remains: inception score, precision, recall")
    singular = scoring.score(few, network, real, options=scoring.Options(singular=True))
    assert singular.measurements["frechet_distance"] > 0.0


def test_statistics_alone_leave_neighbours_out(network, real):
    card = scoring.score(
        DRAWN, network, reference_lib.Reference({"file": "stats.npz"}, real.features)
    )
    assert card.measurements.keys() == {"frechet_distance", "inception_score"}
    assert "no precision, recall and KID: the reference holds no images or features" in card.notes


def fake_inception(*, published, preprocessing="tf", dtype="float32"):
    return inception.Inception(
        params={"x": jnp.zeros(1)},
        preprocessing=preprocessing,
        dtype=dtype,
        sha256="0123456789abcdef" * 4,
        published=published,
    )


@pytest.mark.parametrize(
    ("count", "options", "wanted"),
    [
        (50_000, dict(published=True), ("FID", "sFID", "KID")),
        (10_000, dict(published=True), ("FID-10k", "sFID-10k", "KID")),
        (1_000, dict(published=True), ("FID-1k", "sFID-1k", "KID")),
        (2_500, dict(published=True), ("FID-2500", "sFID-2500", "KID")),
        (100_000, dict(published=True), ("FID-100k", "sFID-100k", "KID")),
        (
            50_000,
            dict(published=True, dtype="bfloat16"),
            ("FID (bfloat16)", "sFID (bfloat16)", "KID (bfloat16)"),
        ),
        (
            50_000,
            dict(published=True, preprocessing="pytorch_fid"),
            tuple(f"{x} (pytorch_fid preprocessing)" for x in ("FID", "sFID", "KID")),
        ),
        (
            50_000,
            dict(published=False),
            (
                "Frechet distance (not FID: weights of sha256 0123456789ab)",
                "spatial Frechet distance (not sFID: weights of sha256 0123456789ab)",
                "kernel distance (not KID: weights of sha256 0123456789ab)",
            ),
        ),
    ],
)
def test_only_one_number_is_called_fid(count, options, wanted):
    keys = ("frechet_distance", "spatial_frechet_distance", "kernel_distance")
    called = scoring.names(fake_inception(**options), count, dict.fromkeys(keys, 0.0))
    assert tuple(called[key] for key in keys) == wanted


def test_few_images_are_told_by_every_name_that_depends_on_them(real):
    keys = ("frechet_distance", "inception_score", "precision", "kernel_distance")
    called = scoring.names(
        fake_inception(published=True, dtype="bfloat16"),
        1_000,
        dict.fromkeys(keys, 0.0),
        reference=real,
    )
    assert tuple(called[key] for key in keys) == (
        "FID-1k (bfloat16, to 300 images)",
        "Inception Score-1k (bfloat16)",
        "precision (bfloat16, to 300 images)",
        "KID (bfloat16)",
    )


def test_two_images_leave_nothing_of_neighbours_on_the_card(network, real):
    card = scoring.score([(DRAWN[0:2], None)], network, real)
    assert not {"precision and recall", "kernel distance"} & card.measured_with.keys()


def test_other_networks_have_a_frechet_distance(network):
    called = scoring.names(network, 50_000, {"frechet_distance": 0.0})
    assert called == {"frechet_distance": "Frechet distance (not FID: other features)"}
