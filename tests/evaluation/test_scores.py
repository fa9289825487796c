"""Limits of the scores, and paired comparisons."""

import numpy as np
import pytest

from arcond_jax.evaluation import paired, scores


def test_inception_score_is_the_number_of_classes_when_sure_and_even():
    logits = 100.0 * np.eye(5)[np.arange(50) % 5]
    assert scores.inception_score(logits) == pytest.approx(5.0, rel=1e-6)


def test_inception_score_is_one_when_images_are_read_alike():
    alike = np.tile(np.random.default_rng(0).standard_normal(5), (20, 1))
    assert scores.inception_score(alike) == pytest.approx(1.0, rel=1e-9)


def test_inception_score_lies_between_and_ignores_the_scale_of_probability():
    logits = np.random.default_rng(1).standard_normal((60, 5)).astype(np.float32)
    score = scores.inception_score(logits)
    assert 1.0 < score < 5.0
    assert scores.inception_score(logits + 1000.0) == pytest.approx(score, rel=1e-3)


def test_class_accuracy_counts_hits():
    label = np.array([0, 1, 2, 2])
    assert scores.class_accuracy(np.eye(3)[[0, 1, 2, 0]], label) == 0.75


def test_copies_have_ratio_zero_and_new_images_ratio_one():
    image = np.random.default_rng(2).uniform(-1, 1, (60, 3, 3, 1))
    train, held_out, fresh = image[:20], image[20:40], image[40:]
    distance = scores.mean_nearest_distance(held_out, train)
    copied = scores.nearest_neighbour_ratio(train, train, held_out_distance=distance)
    assert copied == pytest.approx(0.0, abs=1e-6)
    new = scores.nearest_neighbour_ratio(fresh, train, held_out_distance=distance)
    assert new == pytest.approx(1.0, abs=0.2)


def test_paired_difference_is_free_of_what_seeds_share():
    shared = np.array([10.0, -3.0, 7.0, 100.0])
    gain = np.array([0.1, 0.3, 0.1, 0.3])
    mean, error = paired.paired_difference(shared + gain, shared)
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx(np.std(gain, ddof=1) / 2)


def test_mean_and_deviation():
    assert paired.mean_and_deviation([1.0, 3.0]) == pytest.approx((2.0, np.sqrt(2.0)))


def test_pairs_need_the_same_seeds_and_at_least_two():
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired.paired_difference(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        paired.paired_difference(np.zeros(1), np.zeros(1))
