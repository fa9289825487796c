"""The denoising MLP: a noisy latent, a time and a condition in; the noise and v out.

Source: MAR (Li et al., 2024, "Autoregressive Image Generation without Vector Quantization"),
models/diffloss.py, `SimpleMLPAdaLN`.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from arcond_jax import placement
from arcond_jax.nn import linear, modulation, norm, parameter, stack

NUM_FREQUENCIES = 128  # MAR's TimestepEmbedder: 256 features, cosines then sines

xavier = nn.initializers.xavier_uniform()


def time_features(t: Int[Array, "..."]) -> Float[Array, "... features"]:
    """Sinusoids of the time, periods from 2 pi to 10000 * 2 pi; Vaswani et al. (2017)."""
    # On the host, since a frequency off by its last bit turns the angle of t = 999 by up to 6e-5.
    exponent = np.float32(-math.log(10000.0)) * np.arange(NUM_FREQUENCIES, dtype=np.float32)
    frequency = np.exp(np.float64(exponent / NUM_FREQUENCIES)).astype(np.float32)
    angle = t[..., None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class ResBlock(nn.Module):
    """Residual MLP whose norm is shifted, scaled and gated by the condition (adaLN)."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "... d"], y: Float[Array, "... d"]) -> Float[Array, "... d"]:
        vectors = modulation.modulation(3, self.width, self.dtype)(jax.nn.silu(y))
        vectors = placement.constrain_batch(vectors)
        shift, scale, gate = modulation.parts(vectors)
        hidden = modulation.modulate(norm.LayerNorm(name="norm")(x), shift, scale)
        for i, axes in enumerate((("embed", "mlp"), ("mlp", "embed"))):
            hidden = linear.Linear(
                (self.width,),
                axes,
                use_bias=True,
                kernel_init=xavier,
                dtype=self.dtype,
                name=f"mlp_{i}",
            )(hidden)
            hidden = jax.nn.silu(hidden) if i == 0 else hidden
        return placement.constrain_batch(x + gate * hidden)


class DiffusionHead(nn.Module):
    """MAR's adaLN MLP over single tokens; returns 2c float32 numbers per token of c channels.

    Attributes:
      channels: c, of the latent.
      depth: Residual blocks.
      width: Of the MLP, independent of the backbone's.
      remat: As in `nn.stack.scanned`.
    """

    channels: int
    depth: int
    width: int
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*n c"], t: Int[Array, "..."], cond: Float[Array, "*n d"]
    ) -> Float[Array, "*n two_c"]:
        """`t` is the original time (0 .. 999), for all rows or one for each."""

        def dense(features: int, axes: tuple, init, name: str) -> linear.Linear:
            return linear.Linear(
                (features,), axes, use_bias=True, kernel_init=init, dtype=self.dtype, name=name
            )

        width = self.width
        time = dense(width, (None, "embed"), parameter.normal_init, "time_0")(time_features(t))
        time = dense(width, ("embed", "mlp"), parameter.normal_init, "time_1")(jax.nn.silu(time))
        y = time + dense(width, ("embed", "mlp"), xavier, "cond")(cond)
        h = dense(width, (None, "embed"), xavier, "input")(x)
        block = stack.rematerialised(ResBlock, self.remat)
        for i in range(self.depth):
            h = block(width, self.dtype, name=f"block_{i}")(h, y)

        last = modulation.modulation(2, width, self.dtype, name="final_modulation")
        vectors = placement.constrain_batch(last(jax.nn.silu(y)))
        h = modulation.modulate(norm.LayerNorm(use_affine=False)(h), *modulation.parts(vectors))
        output = dense(2 * self.channels, ("embed", None), parameter.zeros_init, "output")(h)
        return output.astype(jnp.float32)
