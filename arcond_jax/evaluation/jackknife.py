"""How far a Frechet distance would be off with other images: its error, by leaving some out."""

import numpy as np
from jaxtyping import Float, Int

from arcond_jax.evaluation import frechet, moments

NUM_GROUPS = 10
GROUP_SEED = 0  # the same groups for all samplers, so that differences stay paired


def groups(num_rows: int, num_classes: int) -> Int[np.ndarray, " num_rows"]:
    """The group of each image, from 0 to `NUM_GROUPS` - 1.

    Where classes take turns and there are enough images, every group has all classes, as the set
    has; else images are dealt out at random, and the error is rather too large.
    """
    if num_rows >= NUM_GROUPS * num_classes:
        return np.arange(num_rows) // num_classes % NUM_GROUPS
    return np.random.default_rng(GROUP_SEED).permutation(num_rows) % NUM_GROUPS


def left_out(
    rows: Float[np.ndarray, "n d"], group: Int[np.ndarray, " n"], real: moments.Statistics
) -> list[float] | None:
    """Frechet distances without each of the groups.

    None if so few images are left that their covariance would be singular.
    """
    least = min(int(np.sum(group != one)) for one in range(NUM_GROUPS))
    if least < rows.shape[1]:
        return None
    return [
        frechet.frechet_distance(moments.statistics(rows[group != one]), real)
        for one in range(NUM_GROUPS)
    ]


def error(values: Float[np.ndarray, " groups"] | list[float]) -> float:
    """The standard error of what was computed without each of some groups, or of a difference.

    Source: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", eq. 11.5, for groups.
    """
    count = len(values)
    return float(np.sqrt((count - 1) * np.var(values)))
