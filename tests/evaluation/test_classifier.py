"""The feature extractor: learns, repeats itself, and survives the disk."""

import jax
import numpy as np
import pytest

from arcond_jax.data import digits
from arcond_jax.evaluation import classifier as classifier_lib
from arcond_jax.evaluation import features, scores


def test_reads_held_out_digits():
    train, held_out = digits.Digits("train"), digits.Digits("held_out")
    trained = classifier_lib.train_classifier(
        train.image, train.label, num_classes=10, seed=0, num_train_steps=1000
    )
    logits = np.asarray(trained(held_out.image)[1])
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
    for ours, expected in zip(loaded(stripes[0]), classifier(stripes[0]), strict=True):
        np.testing.assert_array_equal(ours, expected)
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
