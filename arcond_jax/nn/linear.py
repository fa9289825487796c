"""Matrices and tables with a name for each axis, so that one table of rules can shard them all."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from arcond_jax.nn import layout, parameter


class Linear(nn.Module):
    """Affine map of the last axis to `features`; parameters float32, arithmetic in `dtype`.

    Attributes:
      features: Sizes of the output axes; several of them save the reshapes around attention.
      axes: Logical names of the kernel's axes: the input's, then one per entry of `features`.

    The kernel may also be given as `layout.turned` leaves it.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = False
    kernel_init: parameter.Initializer = parameter.normal_init
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "..."]:
        x = x.astype(self.dtype)
        if self.has_variable("params", layout.TURNED):
            kernel = self.get_variable("params", layout.TURNED)
            y = jnp.tensordot(kernel.astype(self.dtype), x, axes=(-1, -1))
            y = y.transpose(*range(len(self.features), y.ndim), *range(len(self.features)))
        else:
            y = jnp.tensordot(x, self._kernel(x.shape[-1]), axes=1)
        if self.use_bias:
            y = y + parameter.parameter(
                self, "bias", parameter.zeros_init, self.features, self.axes[1:], self.dtype
            )
        return y

    def _kernel(self, width: int) -> Float[Array, "i ..."]:
        # Initialised as a matrix, so that fan-in is the input axis whatever the output's shape.
        def init(rng, shape, dtype):
            flat = (shape[0], math.prod(shape[1:]))
            return self.kernel_init(rng, flat, dtype).reshape(shape)

        shape = (width, *self.features)
        return parameter.parameter(self, "kernel", init, shape, self.axes, self.dtype)


class Embed(nn.Module):
    """Table of `num_rows` vectors, looked up by id."""

    num_rows: int
    width: int
    init: parameter.Initializer = parameter.normal_init
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... d"]:
        shape = (self.num_rows, self.width)
        axes = ("vocab", "embed")
        table = parameter.parameter(
            self, "table", self.init, shape, axes, self.dtype, looked_up=True
        )
        return jnp.take(table, ids, axis=0).astype(self.dtype)
