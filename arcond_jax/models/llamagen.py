"""LlamaGen: next-code prediction in raster order, from a class or from a caption.

Source: Sun et al. (2024), "Autoregressive Model Beats Diffusion"; LlamaGen,
autoregressive/models/gpt.py.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from arcond_jax import types
from arcond_jax.models import prompted
from arcond_jax.nn import linear, norm, parameter

# Departure: the official deviation is 0.02.
wide_init = nn.initializers.normal(0.1)


class LlamaGen(prompted.Prompted, kw_only=True):
    """The network, a `types.CausalModel` of codes.

    Attributes:
      num_codes: Size of the codebook; None in a model built on this one that has no codes.

    And those of `prompted.Prompted`. LlamaGen trains with `token_dropout` 0.1
    (`--token-dropout-p` of train_c2i.py) and the backbone's `dropout` 0.1.
    """

    num_codes: int | None

    def setup(self) -> None:
        super().setup()
        width, dtype = self.backbone.width, self.backbone.dtype
        self.final_norm = norm.RMSNorm()
        if self.num_codes is not None:
            self.code_embed = linear.Embed(self.num_codes, width, wide_init, dtype)
            self.code_head = linear.Linear(
                (self.num_codes,), ("embed", "vocab"), kernel_init=parameter.zeros_init, dtype=dtype
            )

    @property
    def factor_sizes(self) -> tuple[int, ...]:
        """A code is drawn whole."""
        return () if self.num_codes is None else (self.num_codes,)

    @property
    def channels(self) -> int | None:
        """There are no latents."""
        return None

    def condition(
        self, h: Float[Array, "b n d"], about: Int[Array, "*b n"]
    ) -> Float[Array, "b n d"]:
        """The normalised output of the trunk."""
        del about
        return self.final_norm(h)

    def embed(self, token: types.Token, at: Int[Array, "*b n_plus_w"]) -> Float[Array, "b n d"]:
        """Vectors of the codes; where they lie is the trunk's business."""
        del at
        assert token.codes is not None
        return self.code_vectors(token.codes[..., 0, :])

    def code_vectors(self, codes: Int[Array, "*n 1"]) -> Float[Array, "*n d"]:
        return self.code_embed(codes[..., 0])

    def factor_logits(
        self, row: Float[Array, "*n d"], factors: Int[Array, "*n i"]
    ) -> Float[Array, "*n v"]:
        """Logits of the code; there is no factor before it."""
        del factors
        return self.code_head(row).astype(jnp.float32)

    def all_factor_logits(
        self, row: Float[Array, "*n d"], factors: Int[Array, "*n 1"]
    ) -> list[Float[Array, "*n v"]]:
        """The same, in a list of one."""
        return [self.factor_logits(row, factors)]
