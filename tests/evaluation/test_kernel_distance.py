"""The kernel distance against its definition, and without bias."""

import numpy as np
import pytest

from arcond_jax.evaluation import kernel_distance


def test_by_the_definition():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 3)), rng.standard_normal((7, 3)) + 0.5

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    within = [
        np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
        for z in (x, y)
    ]
    between = np.mean([kernel(a, b) for a in x for b in y])
    found = kernel_distance.squared_mmd(x, y)
    np.testing.assert_allclose(found, sum(within) - 2 * between, rtol=1e-12)


def test_small_sets_have_no_bias():
    """Of two sets of one law the mean is 0 within its error, whatever their size."""
    rng = np.random.default_rng(1)
    found = [
        kernel_distance.squared_mmd(*rng.standard_normal((2, 10, 4)).astype(np.float32))
        for _ in range(2000)
    ]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error
    assert np.min(found) < 0.0


def test_subsets_estimate_the_whole():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((600, 4)), rng.standard_normal((700, 4)) + 0.3
    found = kernel_distance.kernel_distance(x, y, subset_size=200)
    assert (found.num_subsets, found.subset_size) == (100, 200)
    np.testing.assert_allclose(found.mean, kernel_distance.squared_mmd(x, y), rtol=0.1)
    whole = kernel_distance.kernel_distance(x, y[:600])
    assert (whole.num_subsets, whole.subset_size, whole.deviation) == (1, 600, 0.0)
    np.testing.assert_allclose(whole.mean, kernel_distance.squared_mmd(x, y[:600]), rtol=1e-9)


def test_one_row_is_refused():
    with pytest.raises(ValueError, match="at least 2 rows of each set, got 1"):
        kernel_distance.kernel_distance(np.zeros((1, 3)), np.zeros((5, 3)))
