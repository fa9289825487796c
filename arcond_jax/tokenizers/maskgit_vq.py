"""MaskGIT-VQGAN, the tokenizer of RAR: images in [-1, 1] to 1024 codes of 256 numbers and back.

The network itself works in [0, 1] and its images are clipped to that, so ours to [-1, 1]. It has no
attention, halves by averages, and where channels change a residual block adds a map of its own
output; the released weights depend on the latter. The tokenizer is `network.Coded` around it.

Source: Chang et al., MaskGIT (2022); bytedance/1d-tokenizer, modeling/modules/maskgit_vqgan.py and
`PretrainedTokenizer` of modeling/titok.py.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from arcond_jax.nn import codebook, conv
from arcond_jax.tokenizers import network


class MaskGITAutoencoder(nn.Module):
    """Encoder, codebook and decoder; the defaults are those of maskgit-vqgan-imagenet-f16-256.

    Attributes:
      width: Channels at full resolution.
      multipliers: Channels of each level, times `width`.
      num_blocks: Residual blocks per level, of the decoder too, and between the two.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    num_codes: int = 1024
    code_width: int = 256
    dtype: DTypeLike = jnp.float32

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
            down_padding=None,
            shortcut_from="output",
        )

    def setup(self):
        self.encoder = conv.Encoder(self.design, self.code_width, self.dtype)
        self.codebook = codebook.Codebook(self.num_codes, self.code_width)
        self.decoder = conv.Decoder(self.design, network.IMAGE_CHANNELS, self.dtype)

    def to_codes(
        self, image: Float[Array, "b height width channels"]
    ) -> Int[Array, "b rows columns"]:
        """Nearest codes."""
        return self.codebook.nearest(self.encoder((image + 1) / 2))

    def from_codes(
        self, codes: Int[Array, "b rows columns"]
    ) -> Float[Array, "b height width channels"]:
        """Image of a grid of codes, clipped."""
        image = self.decoder(self.codebook.lookup(codes)).astype(jnp.float32)
        return 2 * jnp.clip(image, 0, 1) - 1

    def __call__(
        self, image: Float[Array, "b height width channels"]
    ) -> Float[Array, "b height width channels"]:
        """The image as its codes give it back."""
        return self.from_codes(self.to_codes(image))
