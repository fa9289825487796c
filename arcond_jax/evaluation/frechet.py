"""Frechet distance between Gaussians fitted to two sets of features.

With Inception features this is the FID; with any other features it is another number. float64.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Float64


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and unbiased covariance of `count` feature rows."""

    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]
    count: int


def statistics(features: Float[np.ndarray, "n d"]) -> Statistics:
    """Fits a Gaussian to the rows; sums in float64 whatever the input's precision.

    Raises:
      ValueError: Fewer than two rows, or a feature that is not finite.
    """
    if len(features) < 2:
        raise ValueError(f"A covariance needs at least 2 feature rows, got {len(features)}.")
    rows_finite = np.isfinite(features).all(axis=1)
    if not rows_finite.all():
        raise ValueError(
            f"{np.sum(~rows_finite)} of {len(features)} feature rows are not finite, the first is "
            f"row {np.argmin(rows_finite)}: look at the images it came from."
        )
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    centred = features - mean
    return Statistics(
        mean=mean, covariance=centred.T @ centred / (len(features) - 1), count=len(features)
    )


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), the squared 2-Wasserstein distance.

    The last trace is the sum of the square roots of the eigenvalues of A^1/2 B A^1/2, that is, of
    the singular values of A^1/2 B^1/2. The latter are taken: where a covariance is singular, the
    square root of an eigenvalue that should be zero would turn a rounding error of 1e-16 into 1e-8.

    Returns:
      A distance in squared feature units, at least 0. It is biased upwards when counts are small,
      so compare only sets of equal count against the same reference.

    Raises:
      ValueError: The two sets have features of different sizes.

    Source: Dowson and Landau (1982); Heusel et al. (2017), section 2, for images.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"Features of size {a.mean.size} cannot be compared with features of size "
            f"{b.mean.size}: use one feature extractor for both."
        )
    roots_product = _square_root(a.covariance) @ _square_root(b.covariance)
    cross = np.linalg.svd(roots_product, compute_uv=False).sum()
    distance = (
        np.sum((a.mean - b.mean) ** 2)
        + np.trace(a.covariance)
        + np.trace(b.covariance)
        - 2.0 * cross
    )
    return max(float(distance), 0.0)


def _square_root(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    """Symmetric root; eigenvalues that rounding made negative count as zero."""
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return (eigenvectors * np.sqrt(np.maximum(eigenvalues, 0.0))) @ eigenvectors.T
