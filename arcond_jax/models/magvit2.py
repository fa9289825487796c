"""Open-MAGVIT2's generator: LlamaGen's blocks over positions, and a few more over the bits of one.

A code is so large that it is predicted in factors, low bits first. The trunk runs over [class,
codes], where a code is the sum of the embeddings of its factors; its output is the condition of the
next position. From there a small causal stack runs over [condition, factors but the last], one
output for each factor.

Source: Luo et al. (2024), "Open-MAGVIT2"; TencentARC/SEED-Voken,
src/Open_MAGVIT2/modules/transformer/gpt.py.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from arcond_jax import types
from arcond_jax.models import causal, prompted
from arcond_jax.nn import linear, norm, parameter

# configs/Open-MAGVIT2/gpu/imagenet_conditional_llama_{B,L,XL}.yaml.
SIZES = {
    "B": dict(depth=24, width=1024, num_heads=16, intra_depth=2),
    "L": dict(depth=36, width=1280, num_heads=20, intra_depth=3),
    "XL": dict(depth=48, width=1536, num_heads=24, intra_depth=4),
}
FACTOR_SIZES = (2**6, 2**12)  # `factorized_bits` of the same files


class MAGVIT2(prompted.Prompted, kw_only=True):
    """The network, a `types.CausalModel` of codes; its loss is in `Generator`.

    The blocks over factors share the backbone's dropouts, but have none in windows; the official
    recipe has `dropout` 0.1 (`resid_dropout_p` of the configs, `ffn_dropout_p` of gpt.py), none of
    attention weights, and `token_dropout` 0.1.

    Attributes:
      factor_sizes: Values of each factor of a code, the lowest bits first.
      intra_depth: Blocks over the factors of one code.

    And those of `prompted.Prompted`.
    """

    factor_sizes: tuple[int, ...] = FACTOR_SIZES
    intra_depth: int = 2

    normalised: ClassVar[bool] = False  # what is drawn from conditions normalises for itself

    def setup(self) -> None:
        super().setup()
        width, dtype = self.backbone.width, self.backbone.dtype
        self.factor_embed = [linear.Embed(size, width, dtype=dtype) for size in self.factor_sizes]
        # The condition has the positions of the class token, the factors those of the first row.
        self.intra = self.backbone.clone(
            depth=self.intra_depth,
            grid=(1, len(self.factor_sizes) - 1),
            num_prefix=1,
            unroll=self.intra_depth if self.unrolled else 1,
        )
        self.final_norm = norm.RMSNorm()
        self.factor_head = [
            linear.Linear(
                (size,), ("embed", "vocab"), kernel_init=parameter.zeros_init, dtype=dtype
            )
            for size in self.factor_sizes
        ]

    @property
    def channels(self) -> None:
        """There are no latents."""
        return None

    def condition(
        self, h: Float[Array, "b n d"], about: Int[Array, "*b n"]
    ) -> Float[Array, "b n d"]:
        """The output of the trunk; what is drawn from it normalises for itself."""
        del about
        return h

    def embed(self, token: types.Token, at: Int[Array, "*b n_plus_w"]) -> Float[Array, "b n d"]:
        """Vectors of the codes; where they lie is the trunk's business."""
        del at
        assert token.codes is not None
        return self.code_vectors(token.codes[..., 0, :])

    def code_vectors(self, codes: Int[Array, "*n factors"]) -> Float[Array, "*n d"]:
        """The vectors of the factors, added."""
        parts = [embed(codes[..., i]) for i, embed in enumerate(self.factor_embed)]
        return sum(parts[1:], start=parts[0])

    def factor_logits(
        self, row: Float[Array, "*n d"], factors: Int[Array, "*n i"]
    ) -> Float[Array, "*n v"]:
        """Logits of the factor that follows the given ones.

        The few tokens before it are run again: their cache would cost as many passes over the
        weights.
        """
        rows = self._intra_rows(row, factors)
        return self._head(rows[..., -1, :], factors.shape[-1])

    def all_factor_logits(
        self, row: Float[Array, "*n d"], factors: Int[Array, "*n factors"]
    ) -> list[Float[Array, "*n v"]]:
        """Logits of every factor given the real ones before it."""
        rows = self._intra_rows(row, factors[..., :-1])
        return [self._head(rows[..., i, :], i) for i in range(len(self.factor_sizes))]

    def _intra_rows(
        self, cond: Float[Array, "*n d"], factors: Int[Array, "*n i"]
    ) -> Float[Array, "*n i_plus_1 d"]:
        told = [self.factor_embed[i](factors[..., i]) for i in range(factors.shape[-1])]
        x = jnp.stack([cond, *told], axis=-2)
        rows = self.intra(x.reshape(-1, *x.shape[-2:]))[0]
        return self.final_norm(rows).reshape(x.shape)

    def _head(self, row: Float[Array, "*n d"], i: int) -> Float[Array, "*n v"]:
        return self.factor_head[i](row).astype(jnp.float32)


class Generator(causal.Generator):
    """The training of every causal model, with random streams in an order of its own."""

    streams = ("prompt", "dropout", "windows", "latents")
