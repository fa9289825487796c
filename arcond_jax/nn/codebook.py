"""Vector quantisation: a table of codes, and which of them is nearest."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from arcond_jax.nn import parameter


class Codebook(nn.Module):
    """Table of `num_codes` vectors, replicated: every device looks for the nearest on its own.

    Attributes:
      unit_length: Both the table and what is quantised are brought to length 1 first.

    Source: van den Oord et al. (2017); for length 1, Yu et al., ViT-VQGAN (2022), section 3.2.
    """

    num_codes: int
    width: int
    unit_length: bool = False

    def setup(self):
        shape = (self.num_codes, self.width)
        # The sources' uniform law in -1 / num_codes to 1 / num_codes has about this deviation.
        init = nn.initializers.normal(0.58 / self.num_codes)
        self.table = parameter.parameter(self, "table", init, shape, (None, None))

    def distances(self, latents: Float[Array, "... c"]) -> Float[Array, "... v"]:
        """Squared distance to every code, in float32 whatever the device would rather do."""
        latents, table = self._scaled(latents.astype(jnp.float32)), self._scaled(self.table)
        products = jnp.einsum("...c,vc->...v", latents, table, precision="highest")
        squares = jnp.sum(latents**2, axis=-1, keepdims=True)
        return squares + jnp.sum(table**2, axis=-1) - 2 * products

    def nearest(self, latents: Float[Array, "... c"]) -> Int[Array, "..."]:
        """Nearest code; of equal ones the lowest id."""
        return jnp.argmin(self.distances(latents), axis=-1)

    def lookup(self, codes: Int[Array, "..."]) -> Float[Array, "... c"]:
        """Vectors of the codes; NaN for an id that the table lacks."""
        return jnp.take(self._scaled(self.table), codes, axis=0, mode="fill")

    def _scaled(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        if not self.unit_length:
            return x
        # PyTorch's normalize: a vector of zeros stays one.
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
