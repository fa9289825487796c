"""What is read off a set does not depend on how it comes, or on how many devices read it."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import toy_network

from arcond_jax.evaluation import features, image_sets, moments, scores, summary
from arcond_jax.parallel import mesh as mesh_lib

COUNT = 203


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(features, "BATCH_SIZE", 8)


@pytest.fixture(scope="module")
def images():
    return toy_network.images(COUNT)


@pytest.fixture(scope="module")
def network():
    return toy_network.make()


@pytest.fixture
def whole(images, network):
    image, label = images
    return summary.summarise(
        image_sets.Array(image, label), network, num_classes=toy_network.NUM_CLASSES
    )


def assert_same(found, wanted, rtol=0.0):
    for ours, theirs in ((found.features, wanted.features), (found.spatial, wanted.spatial)):
        assert ours.count == theirs.count
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=rtol)
        np.testing.assert_allclose(ours.covariance, theirs.covariance, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(found.inception_score, wanted.inception_score, rtol=rtol or 1e-15)
    np.testing.assert_array_equal(found.rows, wanted.rows)
    np.testing.assert_array_equal(found.label, wanted.label)
    names = ("count", "image_shape", "class_accuracy", "per_class")
    assert [getattr(found, x) for x in names] == [getattr(wanted, x) for x in names]


def test_it_is_what_all_features_at_once_give(whole, images, network):
    image, label = images
    outputs = network(image)
    rows = np.asarray(outputs.features)
    np.testing.assert_allclose(whole.rows, rows, rtol=1e-5, atol=1e-6)
    wanted = moments.statistics(whole.rows)
    np.testing.assert_allclose(whole.features.covariance, wanted.covariance, rtol=1e-12, atol=1e-14)
    logits = np.asarray(outputs.logits)
    np.testing.assert_allclose(whole.inception_score, scores.inception_score(logits), rtol=1e-6)
    assert whole.class_accuracy == np.mean(logits.argmax(axis=1) == label)
    counts = np.bincount(label)
    assert (whole.count, whole.per_class) == (COUNT, (counts.min(), counts.max()))


@pytest.mark.parametrize("sizes", [[203], [1, 7, 8, 100, 87], [3] * 67 + [2]])
@pytest.mark.parametrize("total", [None, COUNT])
def test_batches_of_any_size_give_the_same(sizes, total, whole, images, network):
    cuts = np.cumsum([0, *sizes])
    batches = ([x[low:high] for x in images] for low, high in itertools.pairwise(cuts))
    found = summary.summarise(
        map(tuple, batches), network, total=total, num_classes=toy_network.NUM_CLASSES
    )
    assert_same(found, whole)


def test_eight_devices_give_the_same(whole, images, network):
    """To 1e-12, as they have it bit for bit but for the order of sums; here in the same order."""
    mesh = mesh_lib.make_mesh()
    assert mesh.size == 8
    image, label = images
    for given in (image_sets.Array(image, label), [(image, label)]):
        found = summary.summarise(
            given,
            jax.device_put(network, mesh_lib.replicated(mesh)),
            mesh=mesh,
            num_classes=toy_network.NUM_CLASSES,
        )
        assert_same(found, whole, rtol=1e-12)


def test_some_rows_are_kept_or_none(whole, images, network):
    given = image_sets.Array(*images)
    few = summary.summarise(given, network, keep=10)
    chosen = np.arange(10) * COUNT // 10
    np.testing.assert_array_equal(few.rows, whole.rows[chosen])
    np.testing.assert_array_equal(few.label, whole.label[chosen])
    none = summary.summarise(given, network, keep=0)
    assert none.rows is None
    np.testing.assert_array_equal(none.features.covariance, whole.features.covariance)


class Broken:
    """Features that are not finite from some row on."""

    description, num_classes = "broken", 5

    def __call__(self, image):
        rows = image.reshape(len(image), -1).astype(np.float32)
        rows = np.where(rows[:, :1] == 255, np.nan, rows)
        return features.Outputs(rows, rows[:, :5])


def test_grey_images_are_colours_that_are_equal(images, network):
    grey = images[0][..., :1]
    in_colour = np.repeat(grey, 3, axis=-1)
    for network_of, given, equal in (
        (network, grey, in_colour),
        (toy_network.make(pixels=4 * 4), in_colour, grey),
    ):
        wanted = summary.summarise([(equal, None)], network_of)
        found = summary.summarise([(given, None)], network_of, image_shape=equal.shape[1:])
        np.testing.assert_array_equal(found.rows, wanted.rows)
        assert found.image_shape == equal.shape[1:]
    with pytest.raises(ValueError, match="images have 3 channels, those before them or of the ref"):
        summary.summarise([(images[0], None)], network, image_shape=(4, 4, 1))


def test_bad_images_are_one_line(images, network):
    image, label = images
    few = image[:9]
    nan = np.zeros_like(few)
    nan[8] = 255
    cases = [
        (few.astype(np.float32), None, {}, r"samples must be uint8 .*, got float32 \[9, 4, 4, 3\]"),
        (few[:, :3], None, {}, "the samples: images of 4 x 3 pixels are not square"),
        (few[:0], None, {}, "There are no samples to evaluate"),
        (few, label[:8], {}, "9 images came with 8 labels"),
        (few, label[:9] + 1, dict(num_classes=5), "labels span .* to 5, outside the 5 classes"),
        (few, None, dict(width=2048), "has 12 features, the reference was made with 2048"),
        (few, None, dict(image_shape=(8, 8, 3)), r"samples are \[4, 4, 3\], .*\[8, 8, 3\]"),
        (few, None, dict(total=10), "10 images were announced, 9 came"),
    ]
    for bad_image, bad_label, options, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            summary.summarise([(bad_image, bad_label)], network, what="samples", **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="1 of 1 feature rows are not finite, the first is row 8"):
        summary.summarise([(nan, None)], Broken())
    two_sizes = [(few, None), (few[:, :2, :2], None)]
    with pytest.raises(ValueError, match="cannot be compared"):
        summary.summarise(two_sizes, network)


def test_one_image_has_no_covariance(network):
    found = summary.summarise([(toy_network.images(1)[0], None)], network)
    assert (found.count, found.features, found.spatial, found.label) == (1, None, None, None)
    assert dataclasses.is_dataclass(found)
