"""Feed-forward layers of transformer blocks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from arcond_jax.nn import linear


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), w1 and w3 in one matrix.

    Source: Shazeer (2020); LlamaGen, autoregressive/models/gpt.py, `FeedForward`.
    """

    width: int
    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        both = linear.Linear((2, self.hidden), ("embed", None, "mlp"), dtype=self.dtype)(x)
        gated = jax.nn.silu(both[..., 0, :]) * both[..., 1, :]
        return linear.Linear((self.width,), ("mlp", "embed"), dtype=self.dtype)(gated)


class GeluMLP(nn.Module):
    """w2 gelu(w1 x), exact GELU, no biases."""

    width: int
    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        hidden = linear.Linear((self.hidden,), ("embed", "mlp"), dtype=self.dtype)(x)
        hidden = jax.nn.gelu(hidden, approximate=False)
        return linear.Linear((self.width,), ("mlp", "embed"), dtype=self.dtype)(hidden)


def swiglu_hidden(width: int, multiple_of: int = 256) -> int:
    """Hidden size of LlamaGen's SwiGLU: 8/3 of the width, rounded up to a multiple."""
    hidden = int(8 * width / 3)
    return multiple_of * -(-hidden // multiple_of)
