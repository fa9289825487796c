"""LlamaGen from text: a caption stands before the grid, where the class was. For sampling only.

A caption is what a frozen text encoder makes of its words, padded in front to a fixed number of
vectors. Captions lie beside the parameters (`with_captions`), and a label is the number of one.

Source: Sun et al. (2024), "Autoregressive Model Beats Diffusion"; LlamaGen,
autoregressive/models/gpt.py, `CaptionEmbedder`, and generate.py.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from arcond_jax import types
from arcond_jax.models import gpt
from arcond_jax.nn import attention, linear, mlp, norm, parameter

NUM_PREFIX = 120  # `--cls-token-num` of autoregressive/sample/sample_t2i.py
CAPTION_WIDTH = 2048  # of FLAN-T5-XL, `--t5-feature-dim` there
CAPTIONS = "captions"  # name of their branch in the tree of parameters


def with_captions(
    params: types.Params,
    embedding: Float[Array, "n prefix caption_width"],
    valid: Bool[Array, "n prefix"],
) -> types.Params:
    """The parameters with captions beside them, in place of those they had.

    Args:
      embedding: Encoded captions; what stands at padding does not matter.
      valid: False at the padding, which comes first.
    """
    return {**params, CAPTIONS: {"embedding": embedding, "valid": valid}}


class Captioned(nn.Module):
    """The network; its sampling loop is `sampling.codes.CodeSampler`.

    Attributes:
      backbone: Unbound stack of causal blocks, its prefix as long as a caption.
      num_classes: Captions there are; id `num_classes + i` means none, in the place of caption i.
      num_codes: Size of the codebook.
      caption_width: Of the vectors of a caption.
    """

    backbone: gpt.GPT
    num_classes: int
    num_codes: int
    caption_width: int = CAPTION_WIDTH

    def setup(self) -> None:
        width, dtype = self.backbone.width, self.backbone.dtype
        self.cap_proj = mlp.GeluMLP(width, width, approximate=True, dtype=dtype)
        self.no_caption = parameter.parameter(
            self,
            "no_caption",
            nn.initializers.normal(self.caption_width**-0.5),
            (self.backbone.num_prefix, self.caption_width),
            (None, "embed"),
        )
        self.code_embed = linear.Embed(self.num_codes, width, dtype=dtype)
        self.trunk = self.backbone.clone()
        self.final_norm = norm.RMSNorm()
        self.code_head = linear.Linear(
            (self.num_codes,), ("embed", "vocab"), kernel_init=parameter.zeros_init, dtype=dtype
        )

    @property
    def length(self) -> int:
        return self.backbone.grid[0] * self.backbone.grid[1]

    @property
    def factor_sizes(self) -> tuple[int, ...]:
        """A code is drawn whole."""
        return (self.num_codes,)

    def null(self, label: Int[Array, " b"]) -> Int[Array, " b"]:
        """Labels that mean none.

        Each remembers its caption, since the official code hides the caption's padding from the
        unconditional row too.
        """
        return self.num_classes + label

    def prefix(
        self, label: Int[Array, " b"]
    ) -> tuple[Float[Array, "b prefix d"], Bool[Array, "b places"]]:
        """Embedded captions, and which places of prefix and grid the others may see."""
        captions = self.get_variable("params", CAPTIONS)
        row, told = label % self.num_classes, label < self.num_classes
        valid = captions["valid"][row]
        caption = jnp.where(valid[..., None], captions["embedding"][row], 0.0)
        caption = jnp.where(told[:, None, None], caption, self.no_caption)
        visible = jnp.pad(valid, ((0, 0), (0, self.length)), constant_values=True)
        return self.cap_proj(caption), visible

    def run(
        self, x: Float[Array, "b n d"], cache: attention.Cache | None
    ) -> tuple[Float[Array, "b n d"], attention.Cache | None]:
        """Embedded tokens after those in `cache` to conditions."""
        h, cache = self.trunk(x, cache)
        return self.final_norm(h), cache

    def start(self, label: Int[Array, " b"]) -> tuple[Float[Array, "b d"], attention.Cache]:
        """Condition of the first position, and the cache it leaves."""
        x, visible = self.prefix(label)
        cache = self.backbone.empty_cache(label.shape[0])
        cond, cache = self.run(x, dataclasses.replace(cache, visible=visible))
        assert cache is not None
        return cond[:, -1], cache

    def advance(
        self,
        factors: Int[Array, "b 1"],
        position: Int[Array, ""],
        label: Int[Array, " b"],
        cache: attention.Cache,
    ) -> tuple[Float[Array, "b d"], attention.Cache]:
        """Condition of the position after the one whose code is given."""
        del position, label  # the cache knows both
        cond, filled = self.run(self.code_embed(factors), cache)
        assert filled is not None
        return cond[:, 0], filled

    def factor_logits(
        self, cond: Float[Array, "*n d"], factors: Int[Array, "*n i"]
    ) -> Float[Array, "*n v"]:
        """Logits of the code; there is no factor before it."""
        del factors
        return self.code_head(cond).astype(jnp.float32)

    def join(self, factors: Int[Array, "*n 1"]) -> Int[Array, "*n"]:
        """The code is its only factor."""
        return factors[..., 0]

    def touch_all(self) -> None:
        """Runs every part once, for initialisation; needs no captions."""
        x = jnp.concatenate([self.cap_proj(self.no_caption), self.code_embed(jnp.zeros(1, int))])
        self.code_head(self.run(x[None], None)[0])
