"""Normalisation, always in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arcond_jax.nn import parameter


class RMSNorm(nn.Module):
    """x / rms(x) * scale. Source: Zhang and Sennrich (2019); epsilon as LlamaGen's gpt.py."""

    epsilon: float = 1e-5
    use_scale: bool = True
    axis_name: str | None = "embed"  # None for a head's width, which is never sharded

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        if self.use_scale:
            shape, axes = (x.shape[-1],), (self.axis_name,)
            y = y * parameter.parameter(self, "scale", parameter.ones_init, shape, axes)
        return y.astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std, with scale and bias unless `use_affine` is False. Source: Ba et al. (2016).

    Epsilon 1e-6 is what MAR's blocks and denoising MLP use (models/diffloss.py).
    """

    epsilon: float = 1e-6
    use_affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        if self.use_affine:
            shape, axes = (x.shape[-1],), ("embed",)
            y = y * parameter.parameter(self, "scale", parameter.ones_init, shape, axes)
            y = y + parameter.parameter(self, "bias", parameter.zeros_init, shape, axes)
        return y.astype(x.dtype)
