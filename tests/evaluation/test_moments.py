"""Streamed moments are those of all rows at once, however they are cut and merged."""

import itertools

import numpy as np
import pytest

from arcond_jax.evaluation import moments


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6)) + 100.0).astype(np.float32)


def assert_same(found, wanted):
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-14)
    np.testing.assert_allclose(found.covariance, wanted.covariance, rtol=1e-12, atol=1e-12)
    assert found.count == wanted.count


def test_batches_and_shards_give_what_all_rows_give(rows):
    whole = moments.statistics(rows)
    np.testing.assert_allclose(whole.covariance, np.cov(rows.T.astype(np.float64)), rtol=1e-10)
    shards = []
    for cuts in ([0, 1, 2, 64, 200], [200, 300], [300], [300, 499, 500]):
        shard = moments.Moments(6)
        for low, high in itertools.pairwise(cuts):
            shard.add(rows[low:high])
        shards.append(shard)
    merged = moments.Moments(6)
    for shard in shards:
        merged.merge(moments.Moments.of_arrays(shard.arrays()))
    assert_same(merged.statistics(), whole)


def test_a_mean_far_from_0_costs_few_digits():
    """Of sums of squares none would be left; here what a mean of 2**27 is rounded to, 3e-8."""
    spread = np.random.default_rng(1).standard_normal((1000, 3))
    near, far = (moments.Moments(3) for _ in range(2))
    for start in range(0, 1000, 100):
        near.add(spread[start : start + 100])
        far.add(spread[start : start + 100] + 2.0**27)
    shifted = (spread + 2.0**27) - 2.0**27  # what is left of them
    np.testing.assert_allclose(far.statistics().covariance, np.cov(shifted.T), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(near.statistics().covariance, np.cov(spread.T), rtol=1e-12)


def test_bad_rows_are_refused(rows):
    found = moments.Moments(6)
    found.add(rows)
    rows[3, 2] = np.inf
    with pytest.raises(ValueError, match=r"1 of 500 feature rows are not finite, .* row 503"):
        found.add(rows)
    with pytest.raises(ValueError, match="size 5 cannot be added to features of size 6"):
        found.add(rows[:2, :5])
    with pytest.raises(ValueError, match="at least 2 feature rows, got 0"):
        moments.Moments(6).statistics()
