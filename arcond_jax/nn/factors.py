"""Large codes as several small factors and back: the digits of a number in mixed bases."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def split(codes: Int[Array, "*n"], sizes: Sequence[int]) -> Int[Array, "*n factors"]:
    """Factors of an id, the lowest first; `sizes` says how many values each has.

    For powers of two they are groups of its bits.
    """
    if len(sizes) == 1:
        return codes[..., None]
    return (codes[..., None] // _strides(sizes)) % np.array(sizes, np.int32)


def join(factors: Int[Array, "*n factors"], sizes: Sequence[int]) -> Int[Array, "*n"]:
    """Undoes `split`."""
    if len(sizes) == 1:
        return factors[..., 0]
    return jnp.sum(factors * _strides(sizes), axis=-1, dtype=factors.dtype)


def _strides(sizes: Sequence[int]) -> Int[np.ndarray, " factors"]:
    return np.cumprod([1, *sizes[:-1]], dtype=np.int32)
