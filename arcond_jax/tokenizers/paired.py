"""Two trained tokenizers on one grid: continuous latents of one, discrete codes of the other.

Each position has a latent and a code of the same pixels, for models that draw the code first and
then, told the code, the latent. The two were trained apart, so a code does not quantise the latent
beside it: how much it says of it is measured by `law`, and so is the Gaussian of the latents behind
it. The image is that of the latents; codes beside them are a plan that decoding does not look at.

The combination is this library's own; its parts are those of `kl` and `network.Coded`.
"""

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from arcond_jax import types
from arcond_jax.tokenizers import kl
from arcond_jax.tokenizers import network as network_lib


@no_type_check  # as a tree it also holds shapes or shardings where the arrays are
@flax.struct.dataclass
class Paired:
    """The two tokenizers, a pytree that is saved with the weights.

    `code_law` is that of the latents' units, times their scale. It is estimated from training
    images by whoever encodes all of them; None where nobody has.
    """

    latents: kl.KL
    codes: network_lib.Coded
    code_law: types.CodeLaw | None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.latents.grid

    def encode(
        self, image: Float[Array, "b height width channels"], rng: Key[Array, ""] | None = None
    ) -> types.Tokens:
        """Codes, and scaled latents: one draw from their posterior, or its mode without `rng`."""
        return self.tokens(self.store(image), rng)

    def store(self, image: Float[Array, "b height width channels"]) -> types.Stored:
        """The moments of the posterior, before they are cut into tokens, and the codes."""
        moments, codes = self.latents.store(image).moments, self.codes.store(image).codes
        return types.Stored(moments=moments, codes=codes)

    def tokens(self, stored: types.Stored, rng: Key[Array, ""] | None = None) -> types.Tokens:
        """As `encode` does from images."""
        latents, codes = self.latents.tokens(stored, rng), self.codes.tokens(stored)
        return types.Tokens(latents=latents.latents, codes=codes.codes)

    def decode(self, tokens: types.Tokens) -> Float[Array, "b height width channels"]:
        """The image of the latents where there are any, else that of the codes; not clipped."""
        carrier = self.codes if tokens.latents is None else self.latents
        return carrier.decode(tokens)


def abstract(latents: kl.KL, codes: network_lib.Coded, *, with_law: bool) -> Paired:
    """The shapes of a pair, without data: what a checkpoint is restored into.

    Args:
      with_law: Whether it knows the Gaussians behind the codes.

    Raises:
      ValueError: The grids of the two differ.
    """
    if latents.grid != codes.grid:
        ours, theirs = ("x".join(map(str, x.grid)) for x in (latents, codes))
        raise ValueError(
            f"latents on a grid of {ours} and codes on one of {theirs} are no pair: take tokenizers"
            " whose tokens cover the same pixels"
        )
    v, c = codes.network.num_codes, latents.channels
    law: Any = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((v, c), (v, c, c))]
    law = types.CodeLaw(*law) if with_law else None
    return Paired(latents, codes, law)
