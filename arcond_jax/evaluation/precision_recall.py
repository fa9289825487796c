"""Precision and recall of a set of samples: are they plausible, and do they cover the reference."""

import numpy as np
from jaxtyping import Float

from arcond_jax.evaluation import neighbours

NUM_NEIGHBOURS = 3  # Kynkaanniemi et al. (2019)


def precision_recall(
    features: Float[np.ndarray, "n d"],
    reference_features: Float[np.ndarray, "m d"],
    *,
    num_neighbours: int = NUM_NEIGHBOURS,
    dtype: neighbours.Dtype = "float64",
) -> tuple[float, float]:
    """Shares of each set that lie inside the other's manifold.

    A set's manifold is the union of balls around its points, each reaching to the point's
    `num_neighbours`-th nearest neighbour in the same set.

    Args:
      features: Features of the samples.
      reference_features: Features of real images; both shares depend on the density of the set
        that spans the manifold. The paper gives as many as samples, ADM 10,000 for 50,000.
      num_neighbours: 3 in the paper.
      dtype: Of the distances. ADM's evaluator has "float16", and where that overflows "float32".

    Returns:
      Precision (samples inside the reference manifold) and recall (reference images inside the
      samples' manifold), each in [0, 1].

    Raises:
      ValueError: A set has not more points than `num_neighbours`.

    Source: Kynkaanniemi et al. (2019), "Improved Precision and Recall Metric", eq. 1-2;
    guided-diffusion, evaluations/evaluator.py, `ManifoldEstimator`.
    """

    def share(points: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m d"]) -> float:
        radius = neighbours.neighbour_radius(centres, num_neighbours=num_neighbours, dtype=dtype)
        return float(neighbours.inside(points, centres, radius, dtype=dtype).mean())

    return share(features, reference_features), share(reference_features, features)
