"""A variational autoencoder as tokenizer: images in [-1, 1] to continuous latents and back.

KL-16, the tokenizer of MAR (Li et al., Autoregressive Image Generation without Vector Quantization,
2024), turns 16x16 pixels into 16 numbers, times `latent_scale` so that they are of unit deviation.
The latents are one draw of a diagonal Gaussian or its mode. `decode` gives what the network gives:
about [-1, 1], not clipped.

Source: LTH14/mar, models/vae.py, and `patchify` of models/mar.py.
"""

from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Key

from arcond_jax import types
from arcond_jax.nn import conv, linear
from arcond_jax.tokenizers import network as network_lib

LATENT_SCALE = 0.2325  # of kl16.ckpt; MAR, engine_mar.py
LOG_VARIANCES = (-30.0, 20.0)  # the source clamps them to


class KLAutoencoder(nn.Module):
    """Encoder to the moments of a Gaussian, and decoder; the defaults are those of KL-16.

    Attributes:
      width: Channels at full resolution.
      multipliers: Channels of each level, times `width`.
      num_blocks: Residual blocks per level of the encoder; the decoder has one more.
      attention_levels: Of the encoder. The source names the resolution instead: 16 of 256 pixels.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    latent_channels: int = 16
    attention_levels: tuple[int, ...] = (4,)
    dtype: DTypeLike = jnp.float32

    @property
    def design(self) -> conv.Design:
        """Sizes of encoder and decoder."""
        return conv.Design(
            width=self.width,
            multipliers=self.multipliers,
            num_blocks=self.num_blocks,
            mid=("block", "attention", "block"),
            extra_blocks=1,
            encoder_attention=self.attention_levels,
        )

    def setup(self):
        def pointwise(features: int) -> linear.Linear:
            return linear.Linear((features,), (None, None), True, conv.kernel_init, self.dtype)

        self.encoder = conv.Encoder(self.design, 2 * self.latent_channels, self.dtype)
        self.to_moments = pointwise(2 * self.latent_channels)
        self.from_latents = pointwise(self.latent_channels)
        self.decoder = conv.Decoder(self.design, network_lib.IMAGE_CHANNELS, self.dtype)

    def moments(
        self, image: Float[Array, "b height width channels"]
    ) -> Float[Array, "b rows columns moments"]:
        """Mean and log variance, one behind the other on the last axis, not clamped."""
        return self.to_moments(self.encoder(image)).astype(jnp.float32)

    def decode(
        self, latents: Float[Array, "b rows columns c"]
    ) -> Float[Array, "b height width channels"]:
        """Image of latents in the units of the moments."""
        return self.decoder(self.from_latents(latents)).astype(jnp.float32)

    def __call__(
        self, image: Float[Array, "b height width channels"]
    ) -> Float[Array, "b height width channels"]:
        """The image as the mode gives it back."""
        return self.decode(split(self.moments(image))[0])


def split(
    moments: Float[Array, "... moments"],
) -> tuple[Float[Array, "... c"], Float[Array, "... c"]]:
    """Mean and log variance, the latter clamped to `LOG_VARIANCES`."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCES)


def std(moments: Float[Array, "... moments"]) -> Float[Array, "... c"]:
    """Standard deviation of the posterior."""
    return jnp.exp(0.5 * split(moments)[1])


def sample(
    moments: Float[Array, "... moments"], noise: Float[Array, "... c"]
) -> Float[Array, "... c"]:
    """The draw from the posterior that belongs to standard normal noise."""
    return split(moments)[0] + std(moments) * noise


def divergence(moments: Float[Array, "b rows columns moments"]) -> Float[Array, " b"]:
    """KL divergence from the standard normal, in nats per image."""
    mean, log_variance = split(moments)
    terms = mean**2 + jnp.exp(log_variance) - 1.0 - log_variance
    return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


@no_type_check  # as a tree it also holds shapes or shardings where the arrays are
@flax.struct.dataclass
class KL:
    """The trained tokenizer, a pytree that is saved with the weights.

    A token is a square of `patch_size` latents on a side; its numbers are ordered by channel, then
    row, then column, and the tokens are in raster order.
    """

    params: types.Params
    network: KLAutoencoder = flax.struct.field(pytree_node=False)
    image_size: tuple[int, int] = flax.struct.field(pytree_node=False)  # height, width
    latent_scale: float = flax.struct.field(pytree_node=False, default=LATENT_SCALE)
    patch_size: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return network_lib.grid(self.image_size, self.network.design.stride * self.patch_size)

    @property
    def channels(self) -> int:
        """Numbers in a token."""
        return self.network.latent_channels * self.patch_size**2

    @property
    def code_law(self) -> None:
        """There are no codes that could say anything of the latents."""
        return None

    def encode(
        self, image: Float[Array, "b height width channels"], rng: Key[Array, ""] | None = None
    ) -> types.Tokens:
        """Scaled latents: one draw from the posterior, or its mode without `rng`."""
        return self.tokens(self.store(image), rng)

    def store(self, image: Float[Array, "b height width channels"]) -> types.Stored:
        """The moments of the posterior, before they are cut into tokens."""
        network_lib.check_image(image, self.image_size)
        return types.Stored(
            moments=network_lib.apply(self.network, self.params, image, method="moments")
        )

    def tokens(self, stored: types.Stored, rng: Key[Array, ""] | None = None) -> types.Tokens:
        """As `encode` does from images."""
        if stored.moments is None:
            raise ValueError("No moments are stored: store images with this tokenizer first.")
        moments = jnp.asarray(stored.moments, jnp.float32)
        latents = split(moments)[0]
        if rng is not None:
            latents = sample(moments, jax.random.normal(rng, latents.shape))
        return types.Tokens(latents=cut(latents * self.latent_scale, self.patch_size))

    def decode(self, tokens: types.Tokens) -> Float[Array, "b height width channels"]:
        """The image of the latents, not clipped."""
        if tokens.latents is None:
            raise ValueError("Tokens hold no latents: encode images with this tokenizer first.")
        latents = paste(tokens.latents, self.grid, self.patch_size) / self.latent_scale
        return network_lib.apply(self.network, self.params, latents, method="decode")


def abstract(
    network: KLAutoencoder,
    *,
    image_size: tuple[int, int],
    latent_scale: float = LATENT_SCALE,
    patch_size: int = 1,
) -> KL:
    """The shapes of a tokenizer, without data: what a checkpoint is restored into.

    Raises:
      ValueError: The images cannot be cut into tokens of this size.
    """
    network_lib.grid(image_size, network.design.stride * patch_size)
    params = network_lib.abstract_params(network, image_size)
    return KL(params, network, image_size, latent_scale, patch_size)


def cut(latents: Float[Array, "b rows columns c"], patch_size: int) -> Float[Array, "b l channels"]:
    """Squares of latents to tokens in raster order; features by channel, row, column."""
    b, rows, columns, c = latents.shape
    p = patch_size
    squares = latents.reshape(b, rows // p, p, columns // p, p, c).transpose(0, 1, 3, 5, 2, 4)
    return squares.reshape(b, (rows // p) * (columns // p), c * p * p)


def paste(
    tokens: Float[Array, "b l channels"], grid: tuple[int, int], patch_size: int
) -> Float[Array, "b rows columns c"]:
    """Undoes `cut`; `grid` counts tokens."""
    (rows, columns), p = grid, patch_size
    b, _, channels = tokens.shape
    c = channels // p**2
    squares = tokens.reshape(b, rows, columns, c, p, p)
    return squares.transpose(0, 1, 4, 2, 5, 3).reshape(b, rows * p, columns * p, c)
