"""Rotary positions on a two-dimensional grid, as LlamaGen has them."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def rope_table(
    grid: tuple[int, int], head_dim: int, *, num_prefix: int, base: float = 10000.0
) -> Float[np.ndarray, "l pairs 2"]:
    """Cosine and sine for every position of a prefix followed by a raster grid.

    The first half of the feature pairs turns with the row, the second with the column. The rows of
    the prefix are zero, not the identity: the queries and keys of a class token vanish, so every
    position sees it with score 0. That is what the released weights were trained with.

    Raises:
      ValueError: `head_dim` is not divisible by 4.

    Source: Su et al. (2021); LlamaGen, autoregressive/models/gpt.py, `precompute_freqs_cis_2d`.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim {head_dim} must be divisible by 4 for two-dimensional RoPE")
    height, width = grid
    half = head_dim // 2
    frequency = base ** (-np.arange(0, half, 2, dtype=np.float64) / half)
    row, column = np.divmod(np.arange(height * width), width)
    angle = np.concatenate([row[:, None] * frequency, column[:, None] * frequency], axis=-1)
    table = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    prefix = np.zeros((num_prefix, *table.shape[1:]))
    return np.concatenate([prefix, table]).astype(np.float32)


def rotate(
    x: Float[Array, "b l h k"], table: Float[Array, "*b l pairs 2"]
) -> Float[Array, "b l h k"]:
    """Turns adjacent feature pairs by the angles of their positions, in float32.

    The angles are those of all rows, or of each.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = table[..., None, :, 0], table[..., None, :, 1]
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
