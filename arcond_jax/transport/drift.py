"""Drift: how far the conditions met in sampling are from the ideal ones, per slot.

Comes in: two sets of conditions with labels. Goes out: one number per slot, in float64 on the host.
The marginal law of each slot is all that transport is guaranteed to bring closer, so this is what
to report before and after a refinement.
"""

import numpy as np
from jaxtyping import Float, Int
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
    for one_class in np.unique(label):
        x = cond[label == one_class].astype(np.float64).swapaxes(0, 1)
        y = reference[reference_label == one_class].astype(np.float64).swapaxes(0, 1)
        if min(x.shape[1], y.shape[1]) < 2:
            raise ValueError(
                f"Class {one_class} has {x.shape[1]} conditions and {y.shape[1]} reference "
                "conditions; drift needs at least 2 of each."
            )
        values = [
            2.0 * distance.cdist(a, b).mean() - distance.pdist(a).mean() - distance.pdist(b).mean()
            for a, b in zip(x, y, strict=True)  # slot by slot
        ]
        per_class.append(values)
    return np.mean(per_class, axis=0)
