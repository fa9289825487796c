"""Diffusion transformer: the whole grid of latents denoised at once, told the time and the class.

No order and no prefix: the baseline that conditions every step of denoising on one static class.

Source: DiT (Peebles and Xie, 2023, "Scalable Diffusion Models with Transformers"), models.py. Here
patches are the tokenizer's business, and the noise process is MAR's, not DiT's linear one.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, Key

from arcond_jax import types
from arcond_jax.diffusion import gaussian
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.models import diffusion_head
from arcond_jax.nn import attention, linear, norm, parameter, stack

# "XL" is as deep and wide as LlamaGen's XL (models/gpt.py), to stand beside it; adaLN makes it
# larger all the same. The others are DiT's own (models.py, last lines).
SIZES = {
    "XL": dict(depth=36, width=1280, num_heads=20),
    "DiT-S": dict(depth=12, width=384, num_heads=6),
    "DiT-B": dict(depth=12, width=768, num_heads=12),
    "DiT-L": dict(depth=24, width=1024, num_heads=16),
    "DiT-XL": dict(depth=28, width=1152, num_heads=16),
}

xavier = nn.initializers.xavier_uniform()


def modulate(
    x: Float[Array, "b l d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b l d"]:
    """Shifts and scales the normalised tokens of an image alike."""
    return norm.LayerNorm(use_affine=False)(x) * (1.0 + scale[:, None]) + shift[:, None]


def modulation(num: int, width: int, dtype: DTypeLike) -> linear.Linear:
    """Map of the condition to `num` vectors, zero at first (adaLN-zero).

    Its output must be constrained to the batch axes, as in `rar.modulation`.
    """
    return linear.Linear(
        (num, width), ("embed", None, "mlp"), True, parameter.zeros_init, dtype, name="modulation"
    )


class Block(nn.Module):
    """Attention and tanh-GELU MLP, each shifted, scaled and gated by the condition."""

    num_heads: int
    mlp_ratio: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], y: Float[Array, "b d"]
    ) -> tuple[Float[Array, "b l d"], None]:
        def dense(features: tuple[int, ...], axes: tuple, name: str) -> linear.Linear:
            return linear.Linear(features, axes, True, xavier, self.dtype, name=name)

        b, l, d = x.shape
        parts = linear.constrain_batch(modulation(6, d, self.dtype)(y))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (parts[:, i] for i in range(6))

        heads = (3, self.num_heads, d // self.num_heads)
        qkv = dense(heads, ("embed", None, "heads", None), "qkv")(modulate(x, shift, scale))
        mixed = attention.attend(*(qkv[:, :, i] for i in range(3))).reshape(b, l, d)
        x = x + gate[:, None] * dense((d,), ("heads", "embed"), "out")(mixed)

        hidden = dense((self.mlp_ratio * d,), ("embed", "mlp"), "mlp_0")(
            modulate(x, mlp_shift, mlp_scale)
        )
        hidden = jax.nn.gelu(hidden, approximate=True)
        x = x + mlp_gate[:, None] * dense((d,), ("mlp", "embed"), "mlp_1")(hidden)
        return linear.constrain_batch(x), None


class DiT(nn.Module):
    """The network: noisy latents, time and class to 2c float32 numbers per token, noise then v.

    Attributes:
      grid: Rows and columns of the token grid.
      channels: c, of the latents.
      num_classes: Classes; id `num_classes` means none.
      remat, unroll: As in `nn.stack.scanned`.
    """

    grid: tuple[int, int]
    channels: int
    num_classes: int
    depth: int
    width: int
    num_heads: int
    mlp_ratio: int = 4
    remat: str = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l c"], t: Int[Array, "..."], label: Int[Array, " b"]
    ) -> Float[Array, "b l two_c"]:
        """`t` is the original time (0 .. 999), for all images or one for each."""

        def dense(features: int, axes: tuple, init, name: str) -> linear.Linear:
            return linear.Linear((features,), axes, True, init, self.dtype, name=name)

        width = self.width
        time = diffusion_head.time_features(t)
        time = dense(width, (None, "embed"), parameter.normal_init, "time_0")(time)
        time = dense(width, ("embed", "mlp"), parameter.normal_init, "time_1")(jax.nn.silu(time))
        class_embed = linear.Embed(self.num_classes + 1, width, dtype=self.dtype, name="class")
        y = jax.nn.silu(time + class_embed(label))

        h = dense(width, (None, "embed"), xavier, "input")(x)
        h = h + jnp.asarray(position_table(self.grid, width), h.dtype)
        blocks = stack.scanned(
            Block, depth=self.depth, remat=self.remat, unroll=self.unroll, in_axes=nn.broadcast
        )
        h, _ = blocks(self.num_heads, self.mlp_ratio, self.dtype, name="blocks")(h, y)

        parts = linear.constrain_batch(modulation(2, width, self.dtype)(y))
        h = modulate(h, parts[:, 0], parts[:, 1])
        output = dense(2 * self.channels, ("embed", None), parameter.zeros_init, "output")(h)
        return output.astype(jnp.float32)


def position_table(grid: tuple[int, int], width: int) -> Float[np.ndarray, "l d"]:
    """Fixed sinusoids of the column in the first half of the features, of the row in the second.

    Raises:
      ValueError: `width` is not divisible by 4.

    Source: DiT, models.py, `get_2d_sincos_pos_embed`.
    """
    if width % 4:
        raise ValueError(f"width {width} must be divisible by 4 for sinusoids of rows and columns")
    frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = [place[:, None] * frequency for place in (column, row)]
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=-1)
    return table.astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Initialisation and training loss of `DiT`; implements `types.Generator`.

    Attributes:
      network: The Linen module.
      schedule: Noise process.
      label_dropout: Chance that a sample is trained without its class.
    """

    network: DiT
    schedule: schedule_lib.Schedule
    label_dropout: float = 0.1

    def init(self, rng: Key[Array, ""]) -> types.Params:
        """Parameters, boxed with their logical axis names."""
        latents = jnp.zeros((1, self.network.length, self.network.channels))
        zero = jnp.zeros((1,), jnp.int32)
        return self.network.init(rng, latents, zero, zero)["params"]

    def apply(self, params: types.Params, *args: Any) -> Any:
        """Runs the network."""
        return self.network.apply({"params": params}, *args)

    def loss(
        self,
        params: types.Params,
        tokens: types.Tokens,
        label: Int[Array, " b"],
        rng: Key[Array, ""],
        *,
        step: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, ""], types.Metrics]:
        """Diffusion loss, mse + vb, averaged over tokens; the time is one for each image."""
        del step
        x0 = tokens.latents
        if x0 is None:
            raise ValueError("DiT models latents, and these tokens hold none")
        drop_rng, time_rng, noise_rng = jax.random.split(rng, 3)
        dropped = jax.random.bernoulli(drop_rng, self.label_dropout, label.shape)
        label = jnp.where(dropped, self.network.num_classes, label)
        t = jax.random.randint(time_rng, label.shape, 0, len(self.schedule.betas))
        noise = jax.random.normal(noise_rng, x0.shape)
        t_of_tokens = jnp.broadcast_to(t[:, None], x0.shape[:-1])
        x = gaussian.q_sample(x0, t_of_tokens, noise, schedule=self.schedule)
        output = self.apply(params, x, t, label)
        losses = gaussian.loss(output, x0, x, t_of_tokens, noise, schedule=self.schedule)
        mse, vb = (jnp.mean(loss) for loss in losses)
        total = mse + vb
        return total, {
            "loss": total,
            "diffusion/mse": mse,
            "diffusion/vb": vb,
            "loss_diffusion": total,
        }
