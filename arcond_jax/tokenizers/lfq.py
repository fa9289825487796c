"""Open-MAGVIT2's tokenizer: images in [-1, 1] to codes of 18 bits and back, without a codebook.

A bit is set where a latent is above zero, and channel k is bit k. The decoder gets
each bit as -1 or 1; its image is not clipped. The tokenizer is `network.Coded` around the network.

Source: Luo et al., Open-MAGVIT2 (2024); Yu et al., MAGVIT-v2 (2024), section 3.1; TencentARC/
SEED-Voken, src/Open_MAGVIT2/models/lfqgan.py and modules/vqvae/lookup_free_quantize.py.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from arcond_jax.nn import conv
from arcond_jax.tokenizers import network

# configs/Open-MAGVIT2/gpu/imagenet_lfqgan_{256,128}_L.yaml: by the resolution trained for.
SIZES = {
    "256": dict(multipliers=(1, 1, 2, 2, 4)),
    "128": dict(multipliers=(1, 2, 2, 4)),
}


class LFQAutoencoder(nn.Module):
    """Encoder and decoder; the defaults are those of the tokenizer for 256 pixels.

    Attributes:
      width: Channels at full resolution.
      multipliers: Channels of each level, times `width`.
      num_blocks: Residual blocks per level, of the decoder too, and between the two.
      num_bits: Latent channels; at most 31, the bits of an int32 id.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 4
    num_bits: int = 18
    dtype: DTypeLike = jnp.float32

    @property
    def num_codes(self) -> int:
        """Ids there are."""
        return 2**self.num_bits

    @property
    def design(self) -> conv.Design:
        """Sizes of encoder and decoder."""
        return conv.Design(
            width=self.width,
            multipliers=self.multipliers,
            num_blocks=self.num_blocks,
            mid=("block",) * self.num_blocks,
            use_bias=False,
            encoder_kernel=1,
            down_padding=(1, 1),
            upsample="depth",
            adaptive=True,
        )

    def setup(self):
        self.encoder = conv.Encoder(self.design, self.num_bits, self.dtype)
        self.decoder = conv.Decoder(self.design, network.IMAGE_CHANNELS, self.dtype)

    def to_codes(
        self, image: Float[Array, "b height width channels"]
    ) -> Int[Array, "b rows columns"]:
        """Codes of the signs; a latent of exactly zero counts as negative."""
        return from_signs(self.encoder(image))

    def from_codes(
        self, codes: Int[Array, "b rows columns"]
    ) -> Float[Array, "b height width channels"]:
        """Image of a grid of codes."""
        return self.decoder(to_signs(codes, self.num_bits)).astype(jnp.float32)

    def __call__(
        self, image: Float[Array, "b height width channels"]
    ) -> Float[Array, "b height width channels"]:
        """The image as its codes give it back."""
        return self.from_codes(self.to_codes(image))


def from_signs(latents: Float[Array, "... bits"]) -> Int[Array, "..."]:
    """Id whose bit k is set where channel k is above zero."""
    weights = 2 ** np.arange(latents.shape[-1], dtype=np.int32)
    return jnp.sum((latents > 0) * weights, axis=-1, dtype=jnp.int32)


def to_signs(codes: Int[Array, "..."], num_bits: int) -> Float[Array, "... bits"]:
    """Bits of an id as -1 and 1, the lowest bit in channel 0."""
    bits = (codes[..., None] >> np.arange(num_bits, dtype=np.int32)) & 1
    return 2.0 * bits - 1.0
