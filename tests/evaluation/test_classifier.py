"""The feature extractor: learns, repeats itself, and survives the disk."""

import functools

import jax
import numpy as np
import pytest

from arcond_jax.data import digits, images
from arcond_jax.evaluation import classifier as classifier_lib
from arcond_jax.evaluation import features, scores


def test_reads_held_out_digits():
    train, held_out = digits.Digits("train"), digits.Digits("held_out")
    trained = classifier_lib.train_classifier(
        train.image, train.label, num_classes=10, seed=0, num_train_steps=1000
    )
    logits = np.asarray(trained(held_out.image).logits)
    assert scores.class_accuracy(logits, held_out.label) >= 0.97


def test_same_seed_same_weights(stripes, classifier):
    image, label = stripes
    again = classifier_lib.train_classifier(
        image[:120], label[:120], num_classes=3, seed=0, num_train_steps=150
    )
    jax.tree.map(np.testing.assert_array_equal, again.params, classifier.params)


def test_save_and_load_give_the_same_features(stripes, classifier, tmp_path):
    path = tmp_path / "classifier"
    classifier.save(path)
    loaded = classifier_lib.load(path)
    jax.tree.map(np.testing.assert_array_equal, loaded(stripes[0]), classifier(stripes[0]))
    assert isinstance(loaded, features.Features)
    assert loaded.image_shape == (6, 6, 1)
    assert loaded.num_classes == 3


def test_truncated_file_is_one_line(classifier, tmp_path):
    path = tmp_path / "classifier.npz"
    classifier.save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"^.*not a whole classifier file.*$") as error:
        classifier_lib.load(path)
    assert "\n" not in str(error.value)


def test_foreign_files_are_refused(classifier, tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(ValueError, match=r"lacks .*image_shape.*num_classes"):
        classifier_lib.load(path)
    classifier.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["params/logits/bias"] = np.zeros(4, np.float32)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"differs in .*params/logits/bias"):
        classifier_lib.load(path)


def test_images_of_another_shape_are_refused(classifier):
    with pytest.raises(ValueError, match=r"\(6, 6, 1\), got \(8, 8, 1\)"):
        classifier(np.zeros((2, 8, 8, 1), np.float32))


@pytest.mark.parametrize(
    ("label", "message"),
    [(np.zeros(119, np.int32), "119 labels"), (np.full(120, 3), "3 to 3, outside \\[0, 3\\)")],
)
def test_wrong_labels_are_refused(stripes, label, message):
    with pytest.raises(ValueError, match=message):
        classifier_lib.train_classifier(
            stripes[0][:120], label, num_classes=3, seed=0, num_train_steps=150
        )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_classes", np.arange(3), "num_classes must be one whole number"),
        ("num_classes", np.asarray(10**12), "num_classes 1000000000000"),
        ("image_shape", np.array([6, 6]), "image_shape"),
        ("image_shape", np.array([6.0, 6.0, 1.0]), "image_shape"),
        ("image_shape", np.array([10**9, 10**9, 1]), "image_shape"),
        ("params/logits/bias", np.full(3, np.nan, np.float32), "not finite float32"),
        ("params/logits/bias", np.asarray(["a", "b", "c"]), "not finite float32"),
    ],
)
def test_crafted_files_are_one_line(classifier, tmp_path, name, value, message):
    path = tmp_path / "classifier.npz"
    classifier.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, name: value})
    with pytest.raises(ValueError, match=message) as error:
        classifier_lib.load(path)
    assert "\n" not in str(error.value)


def test_photographs_are_read_as_small_images():
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (6, 64, 64, 3)).astype(np.float32)
    trained = classifier_lib.train_classifier(
        image, np.arange(6) % 2, num_classes=2, num_train_steps=2
    )
    assert trained.image_shape == (32, 32, 3)
    small = image.reshape(6, 32, 2, 32, 2, 3).mean((2, 4))
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, trained(image), trained(small))


def test_whole_numbers_are_read_as_what_they_scale_to(stripes, classifier):
    image_uint8 = images.image_to_uint8(stripes[0][:4])
    read, scaled = classifier(image_uint8), classifier(images.uint8_to_image(image_uint8))
    jax.tree.map(np.testing.assert_array_equal, read, scaled)
    assert read.spatial is None
