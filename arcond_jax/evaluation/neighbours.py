"""Distances to nearest neighbours, in float64 and block by block, so that memory stays bounded."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Float64

BLOCK_ROWS = 256  # against 50,000 reference rows: 100 MB an array
REFERENCE_ROWS = 4096  # whose pixels are held in float64: 100 MB at 32x32x3


def squared_distance_blocks(
    points: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]
) -> Iterator[Float64[np.ndarray, "rows m"]]:
    """Yields the squared distances of successive blocks of `points` to every reference row.

    Distances come from |p|^2 + |r|^2 - 2 p.r after the reference mean is taken off, which makes
    them exact to about 1e-15 of the features' mean square; smaller ones come out as zero.
    """
    centre = reference.mean(axis=0, dtype=np.float64)
    reference = reference - centre
    reference_norm = np.sum(reference**2, axis=1)
    for start in range(0, len(points), BLOCK_ROWS):
        block = points[start : start + BLOCK_ROWS] - centre
        norm = np.sum(block**2, axis=1)
        rounding = 1e-13 * (reference_norm.mean() + norm.mean())
        distance = norm[:, None] + reference_norm - 2.0 * block @ reference.T
        yield np.where(distance < rounding, 0.0, distance)


def nearest_distance(
    points: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]
) -> Float64[np.ndarray, " n"]:
    """Euclidean distance of each point to its nearest reference row."""
    nearest = np.full(len(points), np.inf)
    for start in range(0, len(reference), REFERENCE_ROWS):
        blocks = squared_distance_blocks(points, reference[start : start + REFERENCE_ROWS])
        found = np.concatenate([block.min(axis=1) for block in blocks])
        nearest = np.minimum(nearest, found)
    return np.sqrt(nearest)


def neighbour_radius(
    points: Float[np.ndarray, "n d"], *, num_neighbours: int
) -> Float64[np.ndarray, " n"]:
    """Squared distance of each point to its `num_neighbours`-th nearest other point.

    Raises:
      ValueError: There are not more points than neighbours.
    """
    if len(points) <= num_neighbours:
        raise ValueError(
            f"{num_neighbours} neighbours need at least {num_neighbours + 1} points, "
            f"got {len(points)}."
        )
    # Rank 0 is the point itself, at distance zero.
    blocks = squared_distance_blocks(points, points)
    return np.concatenate(
        [np.partition(block, num_neighbours, axis=1)[:, num_neighbours] for block in blocks]
    )
