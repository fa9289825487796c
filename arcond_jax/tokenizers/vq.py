"""LlamaGen's tokenizer: images in [-1, 1] to codes of 8 numbers of length 1, and back, not clipped.

The network is that of KL-16 with attention at the lowest level of the decoder too. The tokenizer
is `network.Coded` around it.

Source: Sun et al., Autoregressive Model Beats Diffusion (2024); FoundationVision/LlamaGen,
tokenizer/tokenizer_image/vq_model.py.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from arcond_jax.nn import codebook, conv, linear
from arcond_jax.tokenizers import network

# vq_model.py, `VQ_16` and `VQ_8`: pixels per code along an edge.
SIZES = {
    "VQ-16": dict(multipliers=(1, 1, 2, 2, 4)),
    "VQ-8": dict(multipliers=(1, 2, 2, 4)),
}


class VQAutoencoder(nn.Module):
    """Encoder, codebook and decoder; the defaults are those of VQ-16.

    Attributes:
      width: Channels at full resolution.
      multipliers: Channels of each level, times `width`.
      num_blocks: Residual blocks per level of the encoder; the decoder has one more.
      latent_channels: Between encoder or decoder and the maps to and from a code's `code_width`.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    latent_channels: int = 256
    num_codes: int = 16384
    code_width: int = 8
    dtype: DTypeLike = jnp.float32

    @property
    def design(self) -> conv.Design:
        """Sizes of encoder and decoder."""
        last = len(self.multipliers) - 1
        return conv.Design(
            width=self.width,
            multipliers=self.multipliers,
            num_blocks=self.num_blocks,
            mid=("block", "attention", "block"),
            extra_blocks=1,
            encoder_attention=(last,),
            decoder_attention=(last,),
        )

    def setup(self):
        def pointwise(features: int) -> linear.Linear:
            return linear.Linear((features,), (None, None), True, conv.kernel_init, self.dtype)

        self.encoder = conv.Encoder(self.design, self.latent_channels, self.dtype)
        self.to_code = pointwise(self.code_width)
        self.codebook = codebook.Codebook(self.num_codes, self.code_width, unit_length=True)
        self.from_code = pointwise(self.latent_channels)
        self.decoder = conv.Decoder(self.design, network.IMAGE_CHANNELS, self.dtype)

    def latents(
        self, image: Float[Array, "b height width channels"]
    ) -> Float[Array, "b rows columns c"]:
        """What is to be quantised; of any length."""
        return self.to_code(self.encoder(image))

    def to_codes(
        self, image: Float[Array, "b height width channels"]
    ) -> Int[Array, "b rows columns"]:
        """Nearest codes."""
        return self.codebook.nearest(self.latents(image))

    def from_codes(
        self, codes: Int[Array, "b rows columns"]
    ) -> Float[Array, "b height width channels"]:
        """Image of a grid of codes."""
        latents = self.from_code(self.codebook.lookup(codes))
        return self.decoder(latents).astype(jnp.float32)

    def __call__(
        self, image: Float[Array, "b height width channels"]
    ) -> Float[Array, "b height width channels"]:
        """The image as its codes give it back."""
        return self.from_codes(self.to_codes(image))
