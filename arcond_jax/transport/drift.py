"""Drift: how far the conditions met in sampling are from the ideal ones, per slot.

Comes in: two sets of conditions with labels. Goes out: one number per slot, in float64 on the host.
The marginal law of each slot is all that transport is guaranteed to bring closer, so this is what
to report before and after a refinement.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize
from scipy.spatial import distance


def energy_distance(
    cond: Float[np.ndarray, "b s d"],
    reference: Float[np.ndarray, "n s d"],
    *,
    label: Int[np.ndarray, " b"],
    reference_label: Int[np.ndarray, " n"],
) -> Float[np.ndarray, " s"]:
    """Unbiased energy distance 2 E|x - y| - E|x - x'| - E|y - y'|, mean over classes.

    Args:
      cond: Conditions met in sampling.
      reference: Conditions of real prefixes, best of images not used for the bank.
      label: Class of each row.
      reference_label: Class of each reference row.

    Returns:
      One value per slot in units of distance; 0 in the mean for equal laws, so it may be negative.

    Raises:
      ValueError: A class has fewer than 2 rows on one side.

    Source: Szekely and Rizzo (2013), eq. 6.1 with U-statistics.
    """
    per_class = []
    for x, y in _by_class(cond, reference, label=label, reference_label=reference_label):
        values = [
            2.0 * distance.cdist(a, b).mean() - distance.pdist(a).mean() - distance.pdist(b).mean()
            for a, b in zip(x, y, strict=True)
        ]
        per_class.append(values)
    return np.mean(per_class, axis=0)


def exact_wasserstein2(
    cond: Float[np.ndarray, "b s d"],
    reference: Float[np.ndarray, "n s d"],
    *,
    label: Int[np.ndarray, " b"],
    reference_label: Int[np.ndarray, " n"],
) -> Float[np.ndarray, " s"]:
    """Squared W2 between samples by optimal assignment, mean over classes.

    The larger side of a class is cut to the size of the smaller one. Finite samples of equal laws
    do not give 0: compare with two sets of real conditions of the same sizes.

    Args:
      cond: Conditions met in sampling.
      reference: Conditions of real prefixes.
      label: Class of each row.
      reference_label: Class of each reference row.

    Returns:
      One value per slot in units of squared distance.

    Raises:
      ValueError: A class has fewer than 2 rows on one side.
    """
    per_class = []
    for x, y in _by_class(cond, reference, label=label, reference_label=reference_label):
        size = min(x.shape[1], y.shape[1])
        values = []
        for a, b in zip(x[:, :size], y[:, :size], strict=True):
            cost = distance.cdist(a, b, "sqeuclidean")
            values.append(cost[optimize.linear_sum_assignment(cost)].mean())
        per_class.append(values)
    return np.mean(per_class, axis=0)


def bures_wasserstein2(
    cond: Float[np.ndarray, "b s d"],
    reference: Float[np.ndarray, "n s d"],
    *,
    label: Int[np.ndarray, " b"],
    reference_label: Int[np.ndarray, " n"],
) -> Float[np.ndarray, " s"]:
    """Squared W2 between normal laws of the same moments, mean over classes.

    |mean - mean'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2) (Dowson and Landau 1982).

    Args:
      cond: Conditions met in sampling; more rows per class than the width for full covariances.
      reference: Conditions of real prefixes.
      label: Class of each row.
      reference_label: Class of each reference row.

    Returns:
      One value per slot in units of squared distance.

    Raises:
      ValueError: A class has fewer than 2 rows on one side.
    """
    per_class = []
    for x, y in _by_class(cond, reference, label=label, reference_label=reference_label):
        shift = ((x.mean(axis=1) - y.mean(axis=1)) ** 2).sum(axis=-1)
        cov_x, cov_y = _covariance(x), _covariance(y)
        values, vectors = np.linalg.eigh(cov_x)
        root = (vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]) @ vectors.swapaxes(1, 2)
        cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_y @ root), 0.0)).sum(axis=-1)
        traces = np.trace(cov_x, axis1=1, axis2=2) + np.trace(cov_y, axis1=1, axis2=2)
        per_class.append(shift + traces - 2.0 * cross)
    return np.mean(per_class, axis=0)


def _by_class(
    cond: Float[np.ndarray, "b s d"],
    reference: Float[np.ndarray, "n s d"],
    *,
    label: Int[np.ndarray, " b"],
    reference_label: Int[np.ndarray, " n"],
) -> Iterator[tuple[Float[np.ndarray, "s n d"], Float[np.ndarray, "s m d"]]]:
    """Yields both sides of each class of `label`, slots first, in float64."""
    for one_class in np.unique(label):
        x = cond[label == one_class].astype(np.float64).swapaxes(0, 1)
        y = reference[reference_label == one_class].astype(np.float64).swapaxes(0, 1)
        if min(x.shape[1], y.shape[1]) < 2:
            raise ValueError(
                f"Class {one_class} has {x.shape[1]} conditions and {y.shape[1]} reference "
                "conditions; drift needs at least 2 of each."
            )
        yield x, y


def _covariance(x: Float[np.ndarray, "s n d"]) -> Float[np.ndarray, "s d d"]:
    centred = x - x.mean(axis=1, keepdims=True)
    return centred.swapaxes(1, 2) @ centred / (x.shape[1] - 1)
