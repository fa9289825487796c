"""Closed forms of the Frechet distance of Gaussians, and its refusals."""

import numpy as np
import pytest
import scipy.linalg

from arcond_jax.evaluation import frechet, moments


def gaussian(mean, covariance):
    return moments.Statistics(
        mean=np.asarray(mean, np.float64), covariance=np.asarray(covariance, np.float64), count=9
    )


def test_one_dimension_is_squared_mean_plus_squared_deviation_difference():
    distance = frechet.frechet_distance(gaussian([1.0], [[4.0]]), gaussian([3.0], [[0.25]]))
    np.testing.assert_allclose(distance, 2.0**2 + (2.0 - 0.5) ** 2, rtol=1e-12)


def test_diagonal_covariances_add_up_over_dimensions():
    rng = np.random.default_rng(0)
    mean_a, mean_b = rng.standard_normal((2, 7))
    deviation_a, deviation_b = rng.uniform(0.1, 3.0, (2, 7))
    distance = frechet.frechet_distance(
        gaussian(mean_a, np.diag(deviation_a**2)), gaussian(mean_b, np.diag(deviation_b**2))
    )
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((deviation_a - deviation_b) ** 2)
    np.testing.assert_allclose(distance, expected, rtol=1e-12)


def test_a_common_rotation_changes_nothing_and_order_does_not_matter():
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    features = [rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5)) for _ in range(2)]
    a, b = map(moments.statistics, features)
    turned_a, turned_b = (moments.statistics(one @ rotation) for one in features)
    distance = frechet.frechet_distance(a, b)
    np.testing.assert_allclose(frechet.frechet_distance(turned_a, turned_b), distance, rtol=1e-10)
    np.testing.assert_allclose(frechet.frechet_distance(b, a), distance, rtol=1e-10)


def test_singular_covariances_lose_no_precision():
    # Ten rows of fifty features: rank nine. A shift by one adds exactly fifty.
    features = np.random.default_rng(2).standard_normal((10, 50)).astype(np.float32)
    statistics = moments.statistics(features)
    assert frechet.frechet_distance(statistics, statistics) < 1e-12
    shifted = moments.statistics(features.astype(np.float64) + 1.0)
    np.testing.assert_allclose(frechet.frechet_distance(statistics, shifted), 50.0, rtol=1e-12)


@pytest.mark.parametrize("count", [200, 30])
def test_it_is_that_of_the_root_of_the_product(count):
    """As ADM's evaluator and pytorch-fid have it; where few rows make it singular, as they can."""
    rng = np.random.default_rng(4)
    mix = rng.standard_normal((2, 40, 40)) * np.geomspace(1.0, 1e-2, 40)
    a, b = (moments.statistics(rng.standard_normal((count, 40)) @ x) for x in mix)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(
        a.covariance + b.covariance - 2 * root.real
    )
    rtol = 1e-9 if count > 40 else 1e-5  # of a singular product roots have half of the digits
    np.testing.assert_allclose(frechet.frechet_distance(a, b), expected, rtol=rtol)


def test_statistics_are_the_unbiased_ones():
    features = np.random.default_rng(3).standard_normal((20, 4))
    statistics = moments.statistics(features)
    np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=1e-12)
    assert statistics.count == 20


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_are_refused(count):
    with pytest.raises(ValueError, match=f"at least 2 feature rows, got {count}"):
        moments.statistics(np.zeros((count, 3)))


def test_features_that_are_not_finite_are_refused():
    features = np.zeros((5, 3))
    features[3, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 5 feature rows are not finite, the first is row 3"):
        moments.statistics(features)


def test_features_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="size 1 cannot be compared with features of size 2"):
        frechet.frechet_distance(gaussian([0.0], [[1.0]]), gaussian([0.0, 0.0], np.eye(2)))
