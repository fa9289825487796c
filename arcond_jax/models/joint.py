"""A causal backbone that gives each position a condition from which its latent is drawn.

Without codes this is autoregression with diffusion loss. With them the code head draws a position's
code from its condition first, and then, told the code, the diffusion head draws the latent. The
condition (normalised hidden state plus a learned position) is what refinement moves; windows of
codes come with `tensorar.Windowed`.

The combination is this library's own. Its parts: MAR (Li et al., 2024) for the diffusion loss,
LlamaGen (Sun et al., 2024) for backbone and codes.
"""

from jaxtyping import Array, Float, Int

from arcond_jax import types
from arcond_jax.models import diffusion_head, llamagen
from arcond_jax.nn import linear, parameter


class Joint(llamagen.LlamaGen, kw_only=True):
    """LlamaGen with a latent at each position, beside its code or in its place.

    Attributes:
      head: Unbound denoising MLP.

    And those of `llamagen.LlamaGen`; `num_codes` is None for a model of latents alone.
    """

    head: diffusion_head.DiffusionHead
    num_codes: int | None = None

    def setup(self) -> None:
        super().setup()
        width, dtype = self.backbone.width, self.backbone.dtype
        self.denoiser = self.head.clone()
        self.latent_in = linear.Linear((width,), (None, "embed"), True, dtype=dtype)
        shape, axes = (self.length, width), (None, "embed")
        self.head_position = parameter.parameter(
            self, "head_position", parameter.normal_init, shape, axes, dtype, looked_up=True
        )
        if self.num_codes is not None:
            # Its last row stands for a code that is not told.
            self.code_cond = linear.Embed(self.num_codes + 1, width, parameter.zeros_init, dtype)

    @property
    def channels(self) -> int:
        """Numbers in a latent."""
        return self.head.channels

    def condition(
        self, h: Float[Array, "b n d"], about: Int[Array, "*b n"]
    ) -> Float[Array, "b n d"]:
        """The normalised output of the trunk, told its position once more."""
        h = super().condition(h, about)
        return h + self.head_position[about].astype(h.dtype)

    def embed(self, token: types.Token, at: Int[Array, "*b n_plus_w"]) -> Float[Array, "b n d"]:
        """Latents and codes, added."""
        assert token.latents is not None
        x = self.latent_in(token.latents)
        return x if token.codes is None else x + super().embed(token, at)

    def latent_cond(
        self, cond: Float[Array, "*n d"], codes: Int[Array, "*n"] | None
    ) -> Float[Array, "*n d"]:
        """The diffusion head's condition, told the code; id `num_codes` tells none."""
        return cond if codes is None else cond + self.code_cond(codes)

    def denoise(
        self, x: Float[Array, "*n c"], t: Int[Array, "..."], cond: Float[Array, "*n d"]
    ) -> Float[Array, "*n two_c"]:
        return self.denoiser(x, t, cond)
