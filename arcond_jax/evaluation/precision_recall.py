"""Precision and recall of a set of samples: are they plausible, and do they cover the reference."""

import numpy as np
from jaxtyping import Bool, Float

from arcond_jax.evaluation import neighbours


def precision_recall(
    features: Float[np.ndarray, "n d"],
    reference_features: Float[np.ndarray, "m d"],
    *,
    num_neighbours: int,
) -> tuple[float, float]:
    """Shares of each set that lie inside the other's manifold.

    A set's manifold is the union of balls around its points, each reaching to the point's
    `num_neighbours`-th nearest neighbour in the same set.

    Args:
      features: Features of the samples.
      reference_features: Features of real images; give as many as samples, since both shares
        depend on the density of the set that spans the manifold.
      num_neighbours: 3 in the paper.

    Returns:
      Precision (samples inside the reference manifold) and recall (reference images inside the
      samples' manifold), each in [0, 1].

    Raises:
      ValueError: A set has not more points than `num_neighbours`.

    Source: Kynkaanniemi et al. (2019), "Improved Precision and Recall Metric", eq. 1-2.
    """
    precision = _inside(features, reference_features, num_neighbours=num_neighbours).mean()
    recall = _inside(reference_features, features, num_neighbours=num_neighbours).mean()
    return float(precision), float(recall)


def _inside(
    points: Float[np.ndarray, "n d"], manifold: Float[np.ndarray, "m d"], *, num_neighbours: int
) -> Bool[np.ndarray, " n"]:
    """Whether each point lies in some ball of the manifold; the border belongs to the ball."""
    radius = neighbours.neighbour_radius(manifold, num_neighbours=num_neighbours)
    # The radius comes from another matrix product than the distance: equal ones differ in rounding.
    radius = radius * (1.0 + 1e-9)
    blocks = neighbours.squared_distance_blocks(points, manifold)
    return np.concatenate([(block <= radius).any(axis=1) for block in blocks])
