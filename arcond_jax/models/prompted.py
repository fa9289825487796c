"""A stack of causal blocks after a prompt: what LlamaGen, Open-MAGVIT2 and the joint models share.

The prompt is a class, one learned vector, or a caption, as many vectors as a frozen text encoder
gives; either stands before the grid. What the tokens are and what is predicted is the models' own.

Source: LlamaGen (Sun et al., 2024), autoregressive/models/gpt.py, `LabelEmbedder` and
`CaptionEmbedder`.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from arcond_jax import types
from arcond_jax.models import gpt
from arcond_jax.nn import attention, linear, mlp, parameter

NUM_CAPTION_VECTORS = 120  # `--cls-token-num` of autoregressive/sample/sample_t2i.py
CAPTION_WIDTH = 2048  # of FLAN-T5-XL, `--t5-feature-dim` there


class Prompted(nn.Module, kw_only=True):
    """Most of `types.CausalModel`; a model adds `condition`, `embed` and what is about codes.

    Attributes:
      backbone: Unbound stack of blocks, its prefix as long as the prompt: 1 for a class.
      num_classes: Classes; id `num_classes` means none. None if prompts are captions.
      caption_width: Of the vectors of a caption.
      token_dropout: In training, of what the backbone is fed, the prompt included.
    """

    backbone: gpt.GPT
    num_classes: int | None
    caption_width: int = CAPTION_WIDTH
    token_dropout: float = 0.0

    normalised: ClassVar[bool] = True  # conditions are of unit size

    def setup(self) -> None:
        width, dtype = self.backbone.width, self.backbone.dtype
        self.drop = nn.Dropout(self.token_dropout)
        self.trunk = self.backbone.clone()
        if self.num_classes is not None:
            self.class_embed = linear.Embed(self.num_classes + 1, width, dtype=dtype)
        else:
            self.cap_proj = mlp.GeluMLP(width, width, approximate=True, dtype=dtype)
            self.no_caption = parameter.parameter(
                self,
                "no_caption",
                nn.initializers.normal(self.caption_width**-0.5),
                (self.backbone.num_prefix, self.caption_width),
                (None, "embed"),
            )

    @property
    def length(self) -> int:
        return self.backbone.grid[0] * self.backbone.grid[1]

    @property
    def window(self) -> int:
        return 1

    @property
    def unrolled(self) -> bool:
        return self.backbone.unroll >= self.backbone.depth

    def no_prompt(self, num_rows: int) -> types.Prompt:
        """Rows that ask for nothing."""
        if self.num_classes is not None:
            return jnp.full((num_rows,), self.num_classes, jnp.int32)
        shape = (num_rows, self.backbone.num_prefix)
        return types.Caption(
            embedding=jnp.zeros((*shape, self.caption_width)),
            valid=jnp.ones(shape, bool),
            given=jnp.zeros(num_rows, bool),
        )

    def null(self, prompt: types.Prompt) -> types.Prompt:
        """The prompts of the unconditional rows beside these."""
        if isinstance(prompt, types.Caption):
            return dataclasses.replace(prompt, given=jnp.zeros_like(prompt.given))
        assert self.num_classes is not None
        return jnp.full_like(prompt, self.num_classes)

    def empty_cache(self, prompt: types.Prompt, spare: int = 0) -> attention.Cache:
        """With room for `spare` places beyond the end."""
        return self.backbone.empty_cache(types.num_rows(prompt), spare)

    def prefix(
        self, prompt: types.Prompt, at: Int[Array, "*b 1"]
    ) -> tuple[Float[Array, "b p d"], Int[Array, "*b p"]]:
        """The embedded prompt; its last condition is about the first position visited."""
        if not isinstance(prompt, types.Caption):
            return self.class_embed(jnp.asarray(prompt))[:, None], at
        caption = jnp.where(prompt.valid[..., None], prompt.embedding, 0.0)
        caption = jnp.where(prompt.given[:, None, None], caption, self.no_caption)
        before = [(0, 0)] * (at.ndim - 1) + [(self.backbone.num_prefix - 1, 0)]
        return self.cap_proj(caption), jnp.pad(at, before, constant_values=-1)

    def advance(
        self,
        x: Float[Array, "b n d"],
        about: Int[Array, "*b n"],
        prompt: types.Prompt,
        cache: attention.Cache | None,
    ) -> tuple[Float[Array, "b n d"], attention.Cache | None]:
        """Conditions after what is fed; dropout where its rng is given."""
        x = self.drop(x, deterministic=not self.has_rng("dropout"))
        num_places = self.backbone.length if cache is None else cache.num_places
        h, cache = self.trunk(x, cache, self._visible(prompt, num_places))
        return self.condition(h, about), cache

    def condition(
        self, h: Float[Array, "b n d"], about: Int[Array, "*b n"]
    ) -> Float[Array, "b n d"]:
        """From the trunk's output to conditions of the positions they are about."""
        raise NotImplementedError

    def rows(self, cond: Float[Array, "*n d"], at: Int[Array, "*m 1"]) -> Float[Array, "*n 1 d"]:
        """The condition itself: the window is one code."""
        del at
        return cond[..., None, :]

    def where(self, at: Int[Array, "*n"]) -> None:
        """The order is always raster, and the trunk counts."""
        del at

    def _visible(self, prompt: types.Prompt, num_places: int) -> Bool[Array, "b places"] | None:
        """Places of prompt and grid that the others may see: all but the padding of captions."""
        if not isinstance(prompt, types.Caption):
            return None
        behind = num_places - self.backbone.num_prefix
        return jnp.pad(prompt.valid, ((0, 0), (0, behind)), constant_values=True)
