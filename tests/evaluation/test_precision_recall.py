"""Precision and recall against hand-made and limiting cases."""

import numpy as np
import pytest

from arcond_jax.evaluation import neighbours, precision_recall


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((300, 4))


def test_identical_sets_cover_each_other(features):
    assert precision_recall.precision_recall(features, features, num_neighbours=3) == (1.0, 1.0)


def test_distant_sets_share_nothing(features):
    result = precision_recall.precision_recall(features, features + 100.0, num_neighbours=3)
    assert result == (0.0, 0.0)


def test_a_collapsed_set_is_precise_without_recall(features):
    collapsed = features[:1] + 1e-3 * features
    precision, recall = precision_recall.precision_recall(collapsed, features, num_neighbours=3)
    assert precision == 1.0
    assert recall < 0.02


def test_intervals_by_hand():
    # k = 1. Reference radii: 1, 1, 3 at 0, 1, 4, so its manifold is [-1, 2] and [1, 7].
    # Sample radii: 0.5, 0.5, 10 at 2, 2.5, 12.5: manifold [1.5, 3] and [2.5, 22.5].
    reference = np.array([[0.0], [1.0], [4.0]])
    samples = np.array([[2.0], [2.5], [12.5]])
    precision, recall = precision_recall.precision_recall(samples, reference, num_neighbours=1)
    assert precision == pytest.approx(2 / 3)  # 2 and 2.5; 12.5 is outside
    assert recall == pytest.approx(1 / 3)  # only 4 is inside


def test_the_border_belongs_to_the_ball_and_copies_to_a_ball_of_no_size():
    reference = np.array([[0.0], [1.0], [2.0]])
    on_border = np.array([[3.0], [3.0], [-1.0]])
    assert precision_recall.precision_recall(on_border, reference, num_neighbours=1)[0] == 1.0
    copies = np.full((4, 3), 1.7)
    assert precision_recall.precision_recall(copies, copies, num_neighbours=3) == (1.0, 1.0)


def test_blocks_change_nothing(features, monkeypatch):
    other = features * 1.3 + 0.2
    whole = precision_recall.precision_recall(features, other, num_neighbours=3)
    nearest = neighbours.nearest_distance(features, other)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 7)
    assert precision_recall.precision_recall(features, other, num_neighbours=3) == whole
    np.testing.assert_allclose(neighbours.nearest_distance(features, other), nearest, rtol=1e-12)


def test_distances_are_those_of_the_definition(features):
    expected = np.linalg.norm(features[:, None] - features[None, :50] - 0.5, axis=2).min(axis=1)
    found = neighbours.nearest_distance(features, features[:50] + 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_too_few_points_are_refused(features):
    with pytest.raises(ValueError, match="3 neighbours need at least 4 points, got 3"):
        precision_recall.precision_recall(features, features[:3], num_neighbours=3)
