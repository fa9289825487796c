"""Feed-forward layers of transformer blocks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from arcond_jax.nn import linear, parameter


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
    """w2 gelu(w1 x).

    Attributes:
      dropout: Share of activations dropped after either matrix, where a "dropout" rng is given.
      approximate: GELU by tanh instead of the exact one.
    """

    width: int
    hidden: int
    use_bias: bool = False
    kernel_init: parameter.Initializer = parameter.normal_init
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    approximate: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... d"]:
        def dense(features: int, axes: tuple[str, str]) -> linear.Linear:
            return linear.Linear(
                (features,), axes, self.use_bias, self.kernel_init, dtype=self.dtype
            )

        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        hidden = jax.nn.gelu(dense(self.hidden, ("embed", "mlp"))(x), approximate=self.approximate)
        return drop(dense(self.width, ("mlp", "embed"))(drop(hidden)))


def swiglu_hidden(width: int, multiple_of: int = 256) -> int:
    """Hidden size of LlamaGen's SwiGLU: 8/3 of the width, rounded up to a multiple."""
    hidden = int(8 * width / 3)
    return multiple_of * -(-hidden // multiple_of)
