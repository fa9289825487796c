"""Convolutional encoders and decoders of images: NHWC in, NHWC out, every kernel replicated.

KL-16, LlamaGen's VQ, MaskGIT-VQGAN and Open-MAGVIT2 descend from one network, the autoencoder of
Esser et al., Taming Transformers (2021). A `Design` says in what they differ; `Encoder` and
`Decoder` build any of them. Level 0 is the full resolution; each further level halves it.

Sources: LTH14/mar `models/vae.py`; FoundationVision/LlamaGen `tokenizer/tokenizer_image/
vq_model.py`; bytedance/1d-tokenizer `modeling/modules/maskgit_vqgan.py`; TencentARC/SEED-Voken
`src/Open_MAGVIT2/modules/diffusionmodules/improved_model.py`.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from arcond_jax.nn import attention, linear, parameter

NUM_GROUPS = 32
EPSILON = 1e-6  # of every group normalisation in the sources
kernel_init = nn.initializers.lecun_normal()

Padding = tuple[int, int]  # before and after, the same for rows and columns


@dataclasses.dataclass(frozen=True)
class Design:
    """Sizes of an encoder and the decoder that mirrors it, and the habits of their family.

    Attributes:
      width: Channels of level 0; of level i they are `width * multipliers[i]`.
      num_blocks: Residual blocks in each level of the encoder.
      extra_blocks: How many more a level of the decoder has.
      mid: What lies between encoder and decoder levels, in both, in order.
      encoder_attention, decoder_attention: Levels with attention after each residual block.
      use_bias: Of the encoder's first convolution and those in residual blocks.
      encoder_kernel: Edge of the encoder's last kernel.
      down_padding: Of the convolution of stride 2 that halves a level; None halves it by the mean
        of each 2x2 square.
      upsample: "nearest" doubles a level before a convolution; "depth" after one of four times the
        channels, which become 2x2 squares.
      shortcut_from: Where channels change in a residual block, what is added to its output: a 1x1
        map of its "input", or one of the "output" itself.
      adaptive: Each level of the decoder begins with an `AdaptiveGroupNorm` of its input.
    """

    width: int
    multipliers: tuple[int, ...]
    num_blocks: int
    mid: tuple[Literal["block", "attention"], ...]
    extra_blocks: int = 0
    encoder_attention: tuple[int, ...] = ()
    decoder_attention: tuple[int, ...] = ()
    use_bias: bool = True
    encoder_kernel: int = 3
    down_padding: Padding | None = (0, 1)
    upsample: Literal["nearest", "depth"] = "nearest"
    shortcut_from: Literal["input", "output"] = "input"
    adaptive: bool = False

    @property
    def last(self) -> int:
        """The level of lowest resolution."""
        return len(self.multipliers) - 1

    @property
    def stride(self) -> int:
        """Pixels per latent, along height and width."""
        return 2**self.last

    def channels(self, level: int) -> int:
        """Channels of a level."""
        return self.width * self.multipliers[level]


class Conv(nn.Module):
    """Square convolution; parameters float32, arithmetic in `dtype`.

    Attributes:
      padding: Zeros before and after; None keeps the size, for odd kernels.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: Padding | None = None
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b rows columns d"]:
        size = self.kernel_size
        shape = (size, size, x.shape[-1], self.features)
        kernel = parameter.parameter(self, "kernel", kernel_init, shape, (None,) * 4, self.dtype)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel,
            window_strides=(self.stride, self.stride),
            padding=[self.padding or (size // 2, size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.use_bias:
            y = y + parameter.parameter(
                self, "bias", parameter.zeros_init, (self.features,), (None,), self.dtype
            )
        return y


class GroupNorm(nn.Module):
    """(x - mean) / std over space and each of 32 groups of channels, in float32.

    Source: Wu and He (2018).
    """

    use_affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width c"]:
        channels = x.shape[-1]
        if channels % NUM_GROUPS:
            raise ValueError(
                f"{channels} channels do not fall into {NUM_GROUPS} groups: the width of a "
                f"tokenizer is a multiple of {NUM_GROUPS}"
            )

        # Sums go over space first: an array of [..., 32, c / 32] would waste the lanes of a TPU.
        def group_mean(y: Float[Array, "b height width c"]) -> Float[Array, "b 1 1 c"]:
            by_group = jnp.mean(y, axis=(1, 2)).reshape(-1, NUM_GROUPS, channels // NUM_GROUPS)
            mean = jnp.mean(by_group, axis=-1, keepdims=True)
            return jnp.broadcast_to(mean, by_group.shape).reshape(-1, 1, 1, channels)

        y = x.astype(jnp.float32)
        y = y - group_mean(y)
        y = y * jax.lax.rsqrt(group_mean(y * y) + EPSILON)
        if self.use_affine:
            shape, axes = (channels,), (None,)
            scale = parameter.parameter(self, "scale", parameter.ones_init, shape, axes)
            bias = parameter.parameter(self, "bias", parameter.zeros_init, shape, axes)
            y = y * scale + bias
        return y.astype(x.dtype)


class AdaptiveGroupNorm(nn.Module):
    """Group normalisation scaled by the spread of a latent over space and shifted by its mean.

    The variance is the unbiased one, as in the source, so a latent has at least two positions.

    Source: Open-MAGVIT2, improved_model.py, `AdaptiveGroupNorm`.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b height width d"], latents: Float[Array, "b rows columns c"]
    ) -> Float[Array, "b height width d"]:
        def from_latents(statistic: Float[Array, "b c"], name: str) -> Float[Array, "b d"]:
            layer = linear.Linear(
                (x.shape[-1],), (None, None), True, kernel_init, self.dtype, name=name
            )
            return layer(statistic)

        latents = latents.astype(jnp.float32)
        variance = jnp.var(latents, axis=(1, 2), ddof=1)
        scale = from_latents(jnp.sqrt(variance + EPSILON), "scale")
        shift = from_latents(jnp.mean(latents, axis=(1, 2)), "shift")
        return scale[:, None, None] * GroupNorm(use_affine=False)(x) + shift[:, None, None]


class ResBlock(nn.Module):
    """Two convolutions of normalised swish, added to the input or what stands for it."""

    features: int
    use_bias: bool = True
    shortcut_from: Literal["input", "output"] = "input"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width d"]:
        y = jax.nn.swish(GroupNorm(name="norm_0")(x))
        y = self._conv(3, "conv_0")(y)
        y = jax.nn.swish(GroupNorm(name="norm_1")(y))
        y = self._conv(3, "conv_1")(y)
        if x.shape[-1] != self.features:
            x = self._conv(1, "shortcut")(x if self.shortcut_from == "input" else y)
        return x + y

    def _conv(self, size: int, name: str) -> Conv:
        return Conv(self.features, size, use_bias=self.use_bias, dtype=self.dtype, name=name)


class AttentionBlock(nn.Module):
    """Self-attention of one head over all positions, added to the input."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width c"]:
        b, height, width, c = x.shape

        def map_to(features: tuple[int, ...], name: str) -> linear.Linear:
            axes = (None,) * (1 + len(features))
            return linear.Linear(features, axes, True, kernel_init, self.dtype, name=name)

        y = GroupNorm(name="norm")(x).reshape(b, height * width, c)
        queries, keys, values = (map_to((1, c), n)(y) for n in ("queries", "keys", "values"))
        y = attention.attend(queries, keys, values).reshape(b, height, width, c)
        return x + map_to((c,), "out")(y)


class Encoder(nn.Module):
    """Image to features of `out_channels`, `design.stride` times smaller."""

    design: Design
    out_channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b height width c"]) -> Float[Array, "b rows columns d"]:
        design = self.design
        x = Conv(design.width, use_bias=design.use_bias, dtype=self.dtype, name="conv_in")(image)
        for i in range(design.last + 1):
            for j in range(design.num_blocks):
                x = _block(design, i, self.dtype, f"down_{i}_block_{j}")(x)
                if i in design.encoder_attention:
                    x = AttentionBlock(self.dtype, name=f"down_{i}_attention_{j}")(x)
            if i < design.last:
                x = self._halve(x, f"down_{i}_downsample")
        x = _mid(design, self.dtype, x)
        x = jax.nn.swish(GroupNorm(name="norm_out")(x))
        return Conv(self.out_channels, design.encoder_kernel, dtype=self.dtype, name="conv_out")(x)

    def _halve(self, x: Float[Array, "b height width c"], name: str) -> Float[Array, "b m n c"]:
        padding = self.design.down_padding
        if padding is not None:
            return Conv(x.shape[-1], 3, 2, padding, dtype=self.dtype, name=name)(x)
        b, height, width, c = x.shape
        return x.reshape(b, height // 2, 2, width // 2, 2, c).mean(axis=(2, 4))


class Decoder(nn.Module):
    """Latents to an image `design.stride` times larger; the range is whatever was trained."""

    design: Design
    out_channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, latents: Float[Array, "b rows columns c"]) -> Float[Array, "b m n d"]:
        design = self.design
        x = Conv(design.channels(design.last), dtype=self.dtype, name="conv_in")(latents)
        x = _mid(design, self.dtype, x)
        for i in reversed(range(design.last + 1)):
            if design.adaptive:
                x = AdaptiveGroupNorm(self.dtype, name=f"up_{i}_adaptive")(x, latents)
            for j in range(design.num_blocks + design.extra_blocks):
                x = _block(design, i, self.dtype, f"up_{i}_block_{j}")(x)
                if i in design.decoder_attention:
                    x = AttentionBlock(self.dtype, name=f"up_{i}_attention_{j}")(x)
            if i > 0:
                x = self._double(x, f"up_{i}_upsample")
        x = jax.nn.swish(GroupNorm(name="norm_out")(x))
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(x)

    def _double(self, x: Float[Array, "b height width c"], name: str) -> Float[Array, "b m n c"]:
        channels = x.shape[-1]
        if self.design.upsample == "nearest":
            return Conv(channels, dtype=self.dtype, name=name)(double_nearest(x))
        return depth_to_space(Conv(4 * channels, dtype=self.dtype, name=name)(x))


def double_nearest(x: Float[Array, "b height width c"]) -> Float[Array, "b m n c"]:
    """Each pixel becomes a 2x2 square of itself."""
    b, height, width, c = x.shape
    squares = jnp.broadcast_to(x[:, :, None, :, None], (b, height, 2, width, 2, c))
    return squares.reshape(b, 2 * height, 2 * width, c)


def depth_to_space(x: Float[Array, "b height width c"]) -> Float[Array, "b m n d"]:
    """Channels become 2x2 squares: channel (2 row + column) * d + k is channel k of that pixel.

    This is the order of TensorFlow and Open-MAGVIT2, not that of PyTorch's pixel shuffle.
    """
    b, height, width, c = x.shape
    squares = x.reshape(b, height, width, 2, 2, c // 4).swapaxes(2, 3)
    return squares.reshape(b, 2 * height, 2 * width, c // 4)


def _block(design: Design, level: int, dtype: DTypeLike, name: str) -> ResBlock:
    return ResBlock(design.channels(level), design.use_bias, design.shortcut_from, dtype, name=name)


def _mid(
    design: Design, dtype: DTypeLike, x: Float[Array, "b height width c"]
) -> Float[Array, "b height width c"]:
    # Called inside a compact method, whose module adopts the layers.
    for i, kind in enumerate(design.mid):
        if kind == "block":
            x = _block(design, design.last, dtype, f"mid_{i}")(x)
        else:
            x = AttentionBlock(dtype, name=f"mid_{i}")(x)
    return x
