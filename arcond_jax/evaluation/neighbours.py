"""Distances to nearest neighbours, block by block, so that memory stays bounded.

float64 is exact to 1e-15 of the features' mean square. float32 and float16 are what ADM's evaluator
computes with: float16 wherever that holds all distances of a block, else float32.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float64

BLOCK_ROWS = 256
REFERENCE_ROWS = 4096  # with BLOCK_ROWS 8 MB an array of distances, and 64 MB of 2048 features

Dtype = Literal["float64", "float32", "float16"]
Block = Float[np.ndarray, "rows m"]


def nearest_distance(
    points: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]
) -> Float64[np.ndarray, " n"]:
    """Euclidean distance of each point to its nearest reference row."""
    squared = squared_distances("float64", reference)
    nearest = np.full(len(points), np.inf)
    for rows, _, block in _blocks(points, reference, squared):
        nearest[rows] = np.minimum(nearest[rows], block.min(axis=1))
    return np.sqrt(nearest)


def neighbour_radius(
    points: Float[np.ndarray, "n d"], *, num_neighbours: int, dtype: Dtype = "float64"
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
    ranks = num_neighbours + 1
    nearest = np.full((len(points), ranks), np.inf)
    for rows, _, block in _blocks(points, points, squared_distances(dtype, points)):
        both = np.concatenate([nearest[rows], block], axis=1)
        nearest[rows] = np.partition(both, num_neighbours, axis=1)[:, :ranks]
    return nearest.max(axis=1)


def inside(
    points: Float[np.ndarray, "n d"],
    centres: Float[np.ndarray, "m d"],
    radius: Float64[np.ndarray, " m"],
    *,
    dtype: Dtype = "float64",
) -> Bool[np.ndarray, " n"]:
    """Whether each point lies in or on some ball, given by its centre and squared radius."""
    # The radius comes from another matrix product than the distance: equal ones differ in rounding.
    if dtype == "float64":
        radius = radius * (1.0 + 1e-9)
    found = np.zeros(len(points), bool)
    for rows, columns, block in _blocks(points, centres, squared_distances(dtype, centres)):
        found[rows] |= (block <= radius[columns]).any(axis=1)
    return found


Distances = Callable[[Float[np.ndarray, "n d"], Float[np.ndarray, "m d"]], Block]


def squared_distances(dtype: Dtype, reference: Float[np.ndarray, "m d"]) -> Distances:
    """A function of two blocks of rows, the second from `reference`, to their squared distances."""
    if dtype == "float64":
        return _Centred(reference)
    return _as_adm if dtype == "float16" else _in_float32


class _Centred:
    """From |p|^2 + |r|^2 - 2 p.r after the reference mean is taken off, in float64.

    They are exact to about 1e-15 of the features' mean square; smaller ones come out as zero.
    """

    def __init__(self, reference: Float[np.ndarray, "m d"]) -> None:
        self._centre = reference.mean(axis=0, dtype=np.float64)

    def __call__(
        self, points: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]
    ) -> Block:
        points, reference = points - self._centre, reference - self._centre
        norm, reference_norm = np.sum(points**2, axis=1), np.sum(reference**2, axis=1)
        rounding = 1e-13 * (reference_norm.mean() + norm.mean())
        distance = norm[:, None] + reference_norm - 2.0 * points @ reference.T
        return np.where(distance < rounding, 0.0, distance)


def _in_float32(points: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]) -> Block:
    points, reference = points.astype(np.float32), reference.astype(np.float32)
    norm, reference_norm = np.sum(points**2, axis=1), np.sum(reference**2, axis=1)
    return np.maximum(norm[:, None] - 2.0 * (points @ reference.T) + reference_norm, 0.0)


def _as_adm(points: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]) -> Block:
    """float16, its sums of products in float32, or all in float32 if it overflows."""

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float16).astype(np.float32)

    with np.errstate(over="ignore", invalid="ignore"):
        p, r = rounded(points), rounded(reference)
        norm, reference_norm = (rounded(np.sum(rounded(x**2), axis=1)) for x in (p, r))
        difference = rounded(norm[:, None] - rounded(2.0 * rounded(p @ r.T)))
        distance = np.maximum(rounded(difference + reference_norm), 0.0)
    return distance if np.isfinite(distance).all() else _in_float32(points, reference)


def _blocks(
    points: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"], squared: Distances
) -> Iterator[tuple[slice, slice, Block]]:
    """Rows, columns, and the squared distances between them."""
    for column in range(0, len(reference), REFERENCE_ROWS):
        columns = slice(column, column + REFERENCE_ROWS)
        for row in range(0, len(points), BLOCK_ROWS):
            rows = slice(row, row + BLOCK_ROWS)
            yield rows, columns, squared(points[rows], reference[columns])
