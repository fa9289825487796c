"""Diffusion transformer: the whole grid of latents denoised at once, told the time and the class.

No order and no prefix: the baseline that conditions every step of denoising on one static class.

Source: DiT (Peebles and Xie, 2023, "Scalable Diffusion Models with Transformers"), models.py. Here
patches are the tokenizer's business, and the noise process is MAR's, not DiT's linear one.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, Key

from arcond_jax import placement, types
from arcond_jax.diffusion import gaussian
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.models import diffusion_head, generator
from arcond_jax.nn import attention, linear, modulation, norm, parameter, stack

# "XL" is as deep and wide as LlamaGen's XL (models/gpt.py), to stand beside it; adaLN makes it
# larger all the same. The others are DiT's own (models.py, last lines).
SIZES = {
    "XL": dict(depth=36, width=1280, num_heads=20),
    "DiT-S": dict(depth=12, width=384, num_heads=6),
    "DiT-B": dict(depth=12, width=768, num_heads=12),
    "DiT-L": dict(depth=24, width=1024, num_heads=16),
    "DiT-XL": dict(depth=28, width=1152, num_heads=16),
}

NUM_TIMES = 1000  # of the noise process, MAR's

xavier = nn.initializers.xavier_uniform()


def normalised(
    x: Float[Array, "b l d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"]
) -> Float[Array, "b l d"]:
    """Tokens of unit deviation, those of an image shifted and scaled alike."""
    return modulation.modulate(norm.LayerNorm(use_affine=False)(x), shift, scale)


class Block(nn.Module):
    """Attention and tanh-GELU MLP, each shifted, scaled and gated by the condition."""

    num_heads: int
    mlp_ratio: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], y: Float[Array, "b 1 d"]
    ) -> tuple[Float[Array, "b l d"], None]:
        def dense(features: tuple[int, ...], axes: tuple, name: str) -> linear.Linear:
            return linear.Linear(features, axes, True, xavier, self.dtype, name=name)

        b, l, d = x.shape
        vectors = placement.constrain_batch(modulation.modulation(6, d, self.dtype)(y))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.parts(vectors)

        heads = (3, self.num_heads, d // self.num_heads)
        qkv = dense(heads, ("embed", None, "heads", None), "qkv")(normalised(x, shift, scale))
        mixed = attention.attend(*(qkv[:, :, i] for i in range(3))).reshape(b, l, d)
        x = x + gate * dense((d,), ("heads", "embed"), "out")(mixed)

        hidden = (self.mlp_ratio * d,)
        hidden = dense(hidden, ("embed", "mlp"), "mlp_0")(normalised(x, mlp_shift, mlp_scale))
        hidden = jax.nn.gelu(hidden, approximate=True)
        x = x + mlp_gate * dense((d,), ("mlp", "embed"), "mlp_1")(hidden)
        return placement.constrain_batch(x), None


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

    def no_prompt(self, num_rows: int) -> Int[Array, " b"]:
        """Rows that ask for nothing."""
        return jnp.full((num_rows,), self.num_classes, jnp.int32)

    def null(self, prompt: Int[Array, " b"]) -> Int[Array, " b"]:
        """Labels that mean no class."""
        return jnp.full_like(prompt, self.num_classes)

    def touch_all(self, prompt: Int[Array, " b"]) -> None:
        """Runs every part once, for initialisation."""
        self(jnp.zeros((len(prompt), self.length, self.channels)), jnp.zeros_like(prompt), prompt)

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
        y = jax.nn.silu(time + class_embed(label))[:, None]

        h = dense(width, (None, "embed"), xavier, "input")(x)
        h = h + jnp.asarray(position_table(self.grid, width), h.dtype)
        blocks = stack.scanned(
            Block, depth=self.depth, remat=self.remat, unroll=self.unroll, in_axes=nn.broadcast
        )
        h, _ = blocks(self.num_heads, self.mlp_ratio, self.dtype, name="blocks")(h, y)

        vectors = placement.constrain_batch(modulation.modulation(2, width, self.dtype)(y))
        h = normalised(h, *modulation.parts(vectors))
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
class Generator(generator.Generator):
    """Initialisation and training loss of `DiT`; a `types.Generator`.

    Attributes:
      schedule: Noise process.

    And those of `generator.Generator`.
    """

    schedule: schedule_lib.Schedule

    streams = ("prompt", "time", "noise")

    def loss(
        self,
        params: types.Params,
        tokens: types.Tokens,
        prompt: Int[Array, " b"],
        rng: Key[Array, ""],
        *,
        step: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, ""], types.Metrics]:
        """Diffusion loss, mse + vb, averaged over tokens; the time is one for each image."""
        del step
        rngs, x0 = self.rngs(rng), generator.wanted(tokens, "latents")
        prompt = self.with_prompts_dropped(prompt, rngs["prompt"])
        t = jax.random.randint(rngs["time"], prompt.shape, 0, len(self.schedule.betas))
        noise = jax.random.normal(rngs["noise"], x0.shape)
        t_of_tokens = jnp.broadcast_to(t[:, None], x0.shape[:-1])
        x = gaussian.q_sample(x0, t_of_tokens, noise, schedule=self.schedule)
        output = self.apply(params, x, t, prompt)
        parts = gaussian.loss(output, x0, x, t_of_tokens, noise, schedule=self.schedule)
        mse, vb = (jnp.mean(part) for part in parts)
        loss = mse + vb
        metrics = {"diffusion/mse": mse, "diffusion/vb": vb, "loss_diffusion": loss, "loss": loss}
        return loss, metrics
