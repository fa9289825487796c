"""Mean and covariance of rows that pass by batch by batch, in float64.

Batches and shards are merged by the pairwise update of Chan, Golub and LeVeque (1979), "Updating
Formulae and a Pairwise Algorithm for Computing Sample Variances", eq. 2.1, for matrices: centred
sums add up, and so nothing is lost to the square of a mean far from 0. The rows are not kept.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Float64
from scipy.linalg import get_blas_funcs

BLOCK_ROWS = 1024  # taken to float64 at a time: 16 MB at 2048 features


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and unbiased covariance of feature rows; `count` of them, None where it is not known."""

    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]
    count: int | None

    @property
    def lack(self) -> str | None:
        """Why the covariance is singular, in words; None where it is not known to be."""
        if self.count is None or self.count >= self.mean.size:
            return None
        return (
            f"{self.count} images are fewer than the {self.mean.size} features, so their "
            "covariance is singular"
        )


class Moments:
    """Count, mean and centred sum of products of all rows added so far: 8 d^2 bytes."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean: Float64[np.ndarray, " d"] = np.zeros(width)
        self._scatter = np.zeros((width, width), order="F")  # the upper triangle alone

    def add(self, rows: Float[np.ndarray, "n d"], *, first_row: int | None = None) -> None:
        """Takes rows in.

        Args:
          first_row: Number of the first of them, for the message; None for that of a single stream.

        Raises:
          ValueError: A row is not finite, or the rows are of another width.
        """
        first_row = self.count if first_row is None else first_row
        check_finite(rows, first_row=first_row)
        if rows.shape[1] != self.mean.size:
            raise ValueError(
                f"Features of size {rows.shape[1]} cannot be added to features of size "
                f"{self.mean.size}: use one feature extractor for all."
            )
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS].astype(np.float64)
            mean = block.mean(axis=0)
            block -= mean
            self._add_scatter(block)
            self._move_mean(mean, len(block))

    def merge(self, other: "Moments") -> None:
        """Takes in what another one has seen."""
        if other.count:
            self._scatter += other._scatter
            self._move_mean(other.mean, other.count)

    def statistics(self) -> Statistics:
        """Of all rows so far; raises ValueError below two."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 feature rows, got {self.count}.")
        upper = np.triu(self._scatter)
        upper /= self.count - 1
        covariance = upper + np.triu(upper, 1).T
        return Statistics(self.mean.copy(), covariance, self.count)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays of one shape whatever was added, to send to another process."""
        return {"count": np.asarray(self.count), "mean": self.mean, "scatter": self._scatter}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> "Moments":
        """Undoes `arrays`."""
        made = cls(len(arrays["mean"]))
        made.count, made.mean = int(arrays["count"]), np.array(arrays["mean"], np.float64)
        made._scatter = np.asfortranarray(arrays["scatter"], np.float64)
        return made

    def _move_mean(self, mean: Float64[np.ndarray, " d"], count: int) -> None:
        """Merges the mean of `count` rows whose own scatter is added already."""
        total, step = self.count + count, mean - self.mean
        self._add_scatter(np.sqrt(self.count * (count / total)) * step[None])
        self.mean = self.mean + step * (count / total)
        self.count = total

    def _add_scatter(self, centred: Float64[np.ndarray, "n d"]) -> None:
        # In place, and half of the work of a product.
        add_product: Any = get_blas_funcs("syrk", dtype=np.float64)
        self._scatter = add_product(1.0, centred.T, beta=1.0, c=self._scatter, overwrite_c=True)


def statistics(features: Float[np.ndarray, "n d"]) -> Statistics:
    """Mean and covariance of rows at hand.

    Raises:
      ValueError: Fewer than two rows, or a feature that is not finite.
    """
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.statistics()


def check_finite(rows: Float[np.ndarray, "n d"], *, first_row: int = 0) -> None:
    """Raises ValueError if a feature is not finite; rows are numbered from `first_row`."""
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{np.sum(~finite)} of {len(rows)} feature rows are not finite, the first is row "
            f"{first_row + np.argmin(finite)}: look at the images it came from."
        )
