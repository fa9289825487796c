"""Comparing two samplers run with the same seeds."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Scores = Sequence[float] | Float[np.ndarray, " _"]


def paired_difference(a: Scores, b: Scores) -> tuple[float, float]:
    """Mean of a - b over seeds and its standard error.

    Pairing takes out what a seed does to both, and the noise of a shared reference set. The error
    covers the sampling seeds only, not the seeds of training.

    Args:
      a: One score per seed.
      b: Scores of the other sampler, in the same order of seeds.

    Raises:
      ValueError: Fewer than two seeds, or sets of different length.
    """
    if len(a) != len(b):
        raise ValueError(f"Pairs need the same seeds on both sides, got {len(a)} and {len(b)}.")
    mean, deviation = mean_and_deviation(np.subtract(a, b))
    return mean, deviation / float(np.sqrt(len(a)))


def mean_and_deviation(values: Scores) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; raises ValueError below two seeds."""
    if len(values) < 2:
        raise ValueError(f"A spread over seeds needs at least 2 seeds, got {len(values)}.")
    return float(np.mean(values)), float(np.std(values, ddof=1))
