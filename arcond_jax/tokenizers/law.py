"""What codes say of the latents on their grid: sums over data, and Gaussians estimated from them.

Sums of parts of the data add up to those of all, so that they are made shard by shard. They are of
float64 and in numpy: a table of every code is small, and nothing here is differentiated.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int64, Integer, Num

from arcond_jax import types

JITTER = 1e-6  # of the mean variance: keeps the Cholesky factor of channels that never vary finite
INFORMED = (1e-6, 1.0 - 1e-6)  # what var(x | y) / var(x) is taken for where it is beyond


@dataclasses.dataclass(frozen=True)
class Sums:
    """Of the latents of each code, and of their products.

    Attributes:
      count: Latents.
      total: Sum of them, in their units.
      variance: Sum of the variances of those that are a draw, of which `total` and `products` hold
        the means.
      products: Sum of x_i x_j, of which i <= j are kept, row by row.
    """

    count: Int64[np.ndarray, " v"]
    total: Float64[np.ndarray, "v c"]
    variance: Float64[np.ndarray, "v c"]
    products: Float64[np.ndarray, "v pairs"]

    def __add__(self, other: "Sums") -> "Sums":
        """The sums over both; in another order of many terms the last bits differ."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Sums(*(x + y for x, y in pairs))


def sums(
    latents: Num[np.ndarray, "n c"],
    codes: Integer[np.ndarray, " n"] | None = None,
    *,
    variance: Num[np.ndarray, "n c"] | None = None,
    num_codes: int = 1,
) -> Sums:
    """Adds up latents by their code.

    Args:
      latents: In any units; of those that are a draw, the mean.
      codes: Below `num_codes`; None where all are of one.
      variance: Of the draw; one of each is what counts.
    """
    latents = np.asarray(latents, np.float64)
    n, c = latents.shape
    codes = np.zeros(n, np.int64) if codes is None else codes
    order = np.argsort(codes, kind="stable")
    seen, starts = np.unique(codes[order], return_index=True)
    upper, total, spread = np.triu_indices(c), np.zeros((num_codes, c)), np.zeros((num_codes, c))
    products = np.zeros((num_codes, len(upper[0])))
    for code, members in zip(seen, np.split(order, starts)[1:], strict=True):
        x = latents[members]
        total[code], products[code] = x.sum(axis=0), (x.T @ x)[upper]
        if variance is not None:
            spread[code] = variance[members].sum(axis=0, dtype=np.float64)
    return Sums(np.bincount(codes, minlength=num_codes), total, spread, products)


def statistics(found: Sums) -> dict[str, float]:
    """What latents are like.

    Returns:
      "latent scale", by which they come to a standard deviation of 1; and where there are several
      codes, and some of them were seen repeatedly, "var(x | y) / var(x)", the share of their
      variance that codes leave. Both variances are the unbiased ones: codes are not taken to say
      more where few latents are known of each.
    """
    n, c = found.count.sum(), found.total.shape[1]
    squares = np.trace(_full(found.products.sum(axis=0), c))
    drawn, mean = found.variance.sum(), found.total.sum() / (n * c)
    made = {"latent scale": float(((squares + drawn) / (n * c) - mean**2) ** -0.5)}
    within, freedom = _within(found)
    if len(found.count) > 1 and freedom > 0:
        total = found.total.sum(axis=0)
        whole = (squares - np.sum(total**2) / n) / (n - 1) + drawn / n
        made["var(x | y) / var(x)"] = float(np.trace(within.sum(axis=0)) / freedom / whole)
    return made


def code_law(found: Sums) -> types.CodeLaw:
    """The Gaussian of the latents behind each code, rare and unseen ones included.

    The posterior predictive mean and covariance under a normal-inverse-Wishart prior that is itself
    estimated from all codes (empirical Bayes). With n latents of a code, their mean x and scatter
    S, the mean of all m and the pooled covariance within codes W of c channels,

      mean       = (n x + k m) / (n + k)
      covariance = (1 + 1 / (n + k)) (c W + S + n k / (n + k) (x - m)(x - m)^T) / (n + c)

    where k = r / (1 - r) for r = var(x | y) / var(x), so that means are spread as they are, and the
    prior's covariance counts as c latents, as many as determine one. A code that was never seen has
    the mean of all and, in trace, the variance of all; one seen often, its own. Of latents that are
    a draw, S and (x - m)(x - m)^T are what is expected of one draw of each.

    Source: Murphy, Machine Learning: A Probabilistic Perspective (2012), section 4.6.3, for the
    posterior; k and W by moments.

    Raises:
      ValueError: No code was seen twice.
    """
    c = found.total.shape[1]
    scatter, freedom = _within(found)
    if freedom <= 0:
        raise ValueError(
            f"{found.count.sum()} latents are of as many codes, which says nothing of the spread "
            "behind one: take more images"
        )
    pooled = scatter.sum(axis=0) / freedom
    share = np.clip(statistics(found).get("var(x | y) / var(x)", 1.0), *INFORMED)
    k, n = share / (1.0 - share), found.count[:, None]
    centre = found.total.sum(axis=0) / found.count.sum()
    away = found.total / np.maximum(n, 1) - centre
    mean = centre + n / (n + k) * away
    squares = away[:, :, None] * away[:, None, :]
    squares += _diagonal(found.variance / np.maximum(n, 1) ** 2)
    n = n[..., None]
    spread = n * k / (n + k) * squares
    covariance = (1.0 + 1.0 / (n + k)) * (c * pooled + scatter + spread) / (n + c)
    covariance += JITTER * np.trace(pooled) / c * np.eye(c)
    cholesky = np.linalg.cholesky(covariance)
    return types.CodeLaw(jnp.asarray(mean, jnp.float32), jnp.asarray(cholesky, jnp.float32))


def _within(found: Sums) -> tuple[Float64[np.ndarray, "v c c"], int]:
    """Products of the deviations from the mean of each code, and how many of them are free."""
    total, n = found.total, np.maximum(found.count, 1)[:, None]
    scatter = _full(found.products, total.shape[1])
    scatter -= total[:, :, None] * total[:, None, :] / n[..., None]
    scatter += _diagonal(found.variance * (1.0 - 1.0 / n))
    return scatter, int(found.count.sum() - np.count_nonzero(found.count))


def _diagonal(values: Float64[np.ndarray, "v c"]) -> Float64[np.ndarray, "v c c"]:
    return values[:, :, None] * np.eye(values.shape[1])


def _full(products: Float64[np.ndarray, "*v pairs"], c: int) -> Float64[np.ndarray, "*v c c"]:
    """Symmetric matrices from their upper triangles."""
    upper = np.triu_indices(c)
    made = np.zeros((*products.shape[:-1], c, c))
    made[(..., *upper)] = products
    made[(..., *upper[::-1])] = products
    return made
