"""Masked autoregression: an encoder of the tokens that are there, a decoder of all positions.

Everything is in generation order: `order[i]` is the grid position of the i-th token to be drawn, so
that what is visible is always a prefix, and no mask has to be scattered. The decoder gives each
position a condition, under which the diffusion head draws the token.

Source: MAR (Li et al., 2024, "Autoregressive Image Generation without Vector Quantization"),
models/mar.py. Its orders run the other way (positions listed first stay masked longest), and its
`fake_latent` is the row of the null class here.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Key

from arcond_jax import placement, types
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.models import diffusion_head, generator, losses
from arcond_jax.nn import attention, linear, mlp, norm, parameter, stack

# Of encoder and of decoder, and the denoising MLP of the released weights: models/mar.py,
# `mar_base`, `mar_large`, `mar_huge`, and the evaluation commands of the official README.
SIZES = {
    "B": dict(depth=12, width=768, num_heads=12, head_depth=6, head_width=1024),
    "L": dict(depth=16, width=1024, num_heads=16, head_depth=8, head_width=1280),
    "H": dict(depth=20, width=1280, num_heads=16, head_depth=12, head_width=1536),
}

MASK_RATE_STD = 0.25  # of the truncated normal around 1 that mask rates are drawn from

xavier = nn.initializers.xavier_uniform()


class Block(nn.Module):
    """Pre-norm attention and exact-GELU MLP with biases: timm's vision transformer block.

    Dropout acts where a "dropout" rng is given.
    """

    num_heads: int
    mlp_ratio: float
    attention_dropout: float
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "n m"] | None,
        start: Int[Array, ""] | None = None,
        count: int | None = None,
    ) -> tuple[Float[Array, "b k d"], None]:
        """With `count`, only the rows from `start` on are computed; the others serve as keys."""
        d = x.shape[-1]
        features = (3, self.num_heads, d // self.num_heads)
        axes = ("embed", None, "heads", None)
        y = norm.LayerNorm(name="attention_norm")(x)
        qkv = linear.Linear(features, axes, True, xavier, self.dtype, name="qkv")(y)
        queries, keys, values = (qkv[..., i, :, :] for i in range(3))
        if count is not None and start is not None:
            # The projection of keys and values is fused with that of the queries, which costs the
            # queries of all rows; the rest of the block is left out.
            x, queries = (jax.lax.dynamic_slice_in_dim(z, start, count, 1) for z in (x, queries))
            mask = None if mask is None else mask[:count]

        deterministic = not self.has_rng("dropout")
        attend_dropout = None
        if self.attention_dropout and not deterministic:
            attend_dropout = nn.Dropout(self.attention_dropout, deterministic=False)
        y = attention.attend(queries, keys, values, mask, dropout=attend_dropout)
        y = y.reshape(*y.shape[:2], d)
        y = linear.Linear((d,), ("heads", "embed"), True, xavier, self.dtype, name="out")(y)
        x = x + nn.Dropout(self.dropout, deterministic=deterministic)(y)

        y = norm.LayerNorm(name="mlp_norm")(x)
        hidden = int(self.mlp_ratio * d)
        x = x + mlp.GeluMLP(d, hidden, True, xavier, self.dropout, self.dtype, name="mlp")(y)
        return placement.constrain_batch(x), None


class MAR(nn.Module):
    """The network; its loss is in `Generator`, its sampling loop in `sampling/`.

    Attributes:
      grid: Rows and columns of the token grid.
      num_classes: Classes; id `num_classes` means none.
      head: Unbound denoising MLP.
      buffer_size: Slots before the tokens; each holds the class embedding.
      encoder_depth, encoder_width, encoder_num_heads, and the same of the decoder.
      attention_dropout, dropout: In training, of attention weights and of residual branches.
      remat, unroll: As in `nn.stack.scanned`.
    """

    grid: tuple[int, int]
    num_classes: int
    head: diffusion_head.DiffusionHead
    buffer_size: int = 64
    encoder_depth: int = 12
    encoder_width: int = 768
    encoder_num_heads: int = 12
    decoder_depth: int = 12
    decoder_width: int = 768
    decoder_num_heads: int = 12
    mlp_ratio: float = 4.0
    attention_dropout: float = 0.1
    dropout: float = 0.1
    remat: str = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        slots = self.buffer_size + self.length
        wide, deep = self.encoder_width, self.decoder_width
        embed = (None, "embed")
        self.class_embed = linear.Embed(self.num_classes + 1, wide, dtype=self.dtype)
        self.token_in = linear.Linear((wide,), embed, True, xavier, self.dtype)
        self.encoder_position = self._table("encoder_position", (slots, wide))
        self.input_norm = norm.LayerNorm()
        self.encoder = self._blocks(self.encoder_depth, self.encoder_num_heads)
        self.encoder_norm = norm.LayerNorm()
        self.decoder_in = linear.Linear((deep,), (None, "embed"), True, xavier, self.dtype)
        self.mask_token = self._table("mask_token", (deep,))
        self.decoder_position = self._table("decoder_position", (slots, deep))
        # The last block stands apart: it computes only the positions that are asked for.
        self.decoder = self._blocks(self.decoder_depth - 1, self.decoder_num_heads)
        last = stack.rematerialised(Block, self.remat, static_argnums=(4,))
        self.decoder_last = last(**self._block_options(self.decoder_num_heads))
        self.decoder_norm = norm.LayerNorm()
        self.head_position = self._table("head_position", (self.length, deep))
        self.denoiser = self.head.clone()

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def channels(self) -> int:
        """Numbers in a token."""
        return self.head.channels

    def encode(
        self,
        tokens: Float[Array, "b n c"],
        order: Int[Array, "b n"],
        label: Int[Array, " b"],
        num_visible: Int[Array, ""] | int,
    ) -> Float[Array, "b buffer_and_n encoder_d"]:
        """Encodes the first `num_visible` tokens; later ones are computed but not looked at."""
        b, n = order.shape
        x = jnp.broadcast_to(
            self.class_embed(label)[:, None], (b, self.buffer_size, self.encoder_width)
        )
        x = jnp.concatenate([x, self.token_in(tokens)], axis=1)
        x = self.input_norm(x + self._positions(self.encoder_position, order))
        visible = jnp.arange(self.buffer_size + n) < self.buffer_size + num_visible
        mask = jnp.broadcast_to(visible, (len(visible), len(visible)))
        return self.encoder_norm(self.encoder(x, mask)[0])

    def decode(
        self,
        encoded: Float[Array, "b buffer_and_n encoder_d"],
        order: Int[Array, "b l"],
        num_visible: Int[Array, ""] | int,
        start: Int[Array, ""] | int = 0,
        count: int | None = None,
    ) -> Float[Array, "b k d"]:
        """Conditions of `count` positions from number `start` on; None for all.

        Positions that are not visible hold the mask token; all of them look at each other.
        """
        b = order.shape[0]
        x = self.decoder_in(encoded)
        visible = jnp.arange(x.shape[1]) < self.buffer_size + num_visible
        mask_token = self.mask_token.astype(x.dtype)
        x = jnp.where(visible[:, None], x, mask_token)
        num_masked = self.buffer_size + self.length - x.shape[1]
        masked = jnp.broadcast_to(mask_token, (b, num_masked, self.decoder_width))
        x = jnp.concatenate([x, masked], axis=1)
        x = x + self._positions(self.decoder_position, order)
        x = self.decoder(x, None)[0]
        count = self.length if count is None else count
        start = jnp.asarray(start)
        h = self.decoder_norm(self.decoder_last(x, None, self.buffer_size + start, count)[0])
        places = jax.lax.dynamic_slice_in_dim(order, start, count, axis=1)
        return h + self.head_position[places].astype(h.dtype)

    def denoise(
        self, x: Float[Array, "*n c"], t: Int[Array, "..."], cond: Float[Array, "*n d"]
    ) -> Float[Array, "*n two_c"]:
        return self.denoiser(x, t, cond)

    def no_prompt(self, num_rows: int) -> Int[Array, " b"]:
        """Rows that ask for nothing."""
        return jnp.full((num_rows,), self.num_classes, jnp.int32)

    def null(self, prompt: Int[Array, " b"]) -> Int[Array, " b"]:
        """Labels that mean no class."""
        return jnp.full_like(prompt, self.num_classes)

    def touch_all(self, label: Int[Array, " b"]) -> None:
        """Runs every part once, for initialisation."""
        order = jnp.broadcast_to(jnp.arange(self.length), (label.shape[0], self.length))
        tokens = jnp.zeros((*order.shape, self.channels))
        cond = self.decode(self.encode(tokens, order, label, 0), order, 0)
        self.denoise(tokens, jnp.zeros(order.shape, jnp.int32), cond)

    def _positions(self, table: Array, order: Int[Array, "b n"]) -> Float[Array, "b slots d"]:
        """Rows of a position table for the buffer and the tokens after it."""
        buffer = jnp.broadcast_to(
            table[: self.buffer_size], (order.shape[0], self.buffer_size, table.shape[1])
        )
        places = table[self.buffer_size + order]
        return jnp.concatenate([buffer, places], axis=1).astype(self.dtype)

    def _table(self, name: str, shape: tuple[int, ...]) -> Array:
        axes = (None,) * (len(shape) - 1) + ("embed",)
        return parameter.parameter(
            self, name, parameter.normal_init, shape, axes, self.dtype, looked_up=True
        )

    def _block_options(self, num_heads: int) -> dict[str, Any]:
        return dict(
            num_heads=num_heads,
            mlp_ratio=self.mlp_ratio,
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            dtype=self.dtype,
        )

    def _blocks(self, depth: int, num_heads: int) -> nn.Module:
        blocks = stack.scanned(
            Block, depth=depth, remat=self.remat, unroll=self.unroll, in_axes=nn.broadcast
        )
        return blocks(**self._block_options(num_heads))


@dataclasses.dataclass(frozen=True, eq=False)
class Generator(generator.Generator):
    """Initialisation and training loss of `MAR`; a `types.Generator`.

    Attributes:
      schedule: Noise process of the diffusion loss.
      num_copies: Times each position is noised anew per step (MAR's diffusion_batch_mul).
      mask_rate_min: Least share of positions that are masked, in (0, 1).

    And those of `generator.Generator`.
    """

    schedule: schedule_lib.Schedule
    num_copies: int = 4
    mask_rate_min: float = 0.7

    streams = ("order", "mask_rate", "prompt", "dropout", "head")

    def __post_init__(self) -> None:
        if not 0.0 < self.mask_rate_min < 1.0:
            raise ValueError(f"mask_rate_min {self.mask_rate_min} must be between 0 and 1")

    def loss(
        self,
        params: types.Params,
        tokens: types.Tokens,
        prompt: Int[Array, " b"],
        rng: Key[Array, ""],
        *,
        step: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, ""], types.Metrics]:
        """Diffusion loss, mse + vb, averaged over masked positions."""
        del step
        rngs, latents = self.rngs(rng), generator.wanted(tokens, "latents")
        prompt = self.with_prompts_dropped(prompt, rngs["prompt"])
        order = random_orders(rngs["order"], latents.shape[0], self.network.length)
        latents = in_order(latents, order)
        num_visible = self._num_visible(rngs["mask_rate"])
        dropout = {"dropout": rngs["dropout"]}
        cond = self.teacher_forced(params, latents, order, prompt, num_visible, rngs=dropout)
        masked = jnp.arange(self.network.length) >= num_visible
        time_rng, noise_rng = jax.random.split(rngs["head"])
        t, noise = losses.drawn(
            time_rng, noise_rng, latents, self.num_copies, schedule=self.schedule
        )
        mse, vb = self.head_losses(params, cond, latents, t, noise)
        mse, vb = (jnp.mean(x, where=masked) for x in (mse, vb))
        loss = mse + vb
        metrics = {"diffusion/mse": mse, "diffusion/vb": vb, "loss_diffusion": loss, "loss": loss}
        return loss, metrics | {"mask_rate": jnp.mean(masked)}

    @property
    def max_visible(self) -> int:
        """The most tokens training ever shows: all beyond it are masked at any rate.

        The encoder runs on so many slots and no more, which is static: at a rate of at least 0.7,
        140 of 320. A gradient was 1.4 times faster than with a mask over all positions (MAR-B's
        widths, two blocks a side, 2 CPU cores), and the losses are the same.
        """
        length = self.network.length
        return length - math.ceil(length * self.mask_rate_min)

    def teacher_forced(
        self,
        params: types.Params,
        latents: Float[Array, "b l c"],
        order: Int[Array, "b l"],
        label: Int[Array, " b"],
        num_visible: Int[Array, ""] | int,
        **options: Any,
    ) -> Float[Array, "b l d"]:
        """Conditions of all positions given the first `num_visible` real tokens.

        Latents are in generation order, and so are the conditions.
        """

        def run(network: MAR) -> Float[Array, "b l d"]:
            n = self.max_visible
            encoded = network.encode(latents[:, :n], order[:, :n], label, num_visible)
            return network.decode(encoded, order, num_visible)

        return self.apply(params, method=run, **options)

    def head_losses(
        self,
        params: types.Params,
        cond: Float[Array, "b l d"],
        latents: Float[Array, "b l c"],
        t: Int[Array, "b copies l"],
        noise: Float[Array, "b copies l c"],
    ) -> tuple[Float[Array, "b copies l"], Float[Array, "b copies l"]]:
        """Squared error of the noise and variational term of every position and copy."""
        model = losses.Bound(self.network, {"params": params})
        return losses.diffusion_losses(model, cond, latents, t, noise, schedule=self.schedule)

    def conditions(
        self,
        params: types.Params,
        tokens: types.Tokens,
        prompt: Int[Array, " b"],
        rng: Key[Array, ""],
        *,
        starts: Int[Array, " s"],
    ) -> Float[Array, "b s d"]:
        """What decoding steps see after a real prefix: one position due in each.

        The order is random, so any position that is due has the same law.

        Args:
          starts: How many tokens are visible at each step.
        """
        latents = generator.wanted(tokens, "latents")
        order = random_orders(rng, latents.shape[0], self.network.length)
        latents = in_order(latents, order)

        def one_step(num_visible: Int[Array, ""]) -> Float[Array, "b d"]:
            def run(network: MAR) -> Float[Array, "b 1 d"]:
                encoded = network.encode(latents, order, prompt, num_visible)
                return network.decode(encoded, order, num_visible, num_visible, 1)

            return self.apply(params, method=run)[:, 0]

        return jnp.moveaxis(jax.lax.map(one_step, starts), 0, 1)

    def _num_visible(self, rng: Key[Array, ""]) -> Int[Array, ""]:
        """One number for the batch: its mask rate is normal around 1, cut to [min, 1]."""
        low = (self.mask_rate_min - 1.0) / MASK_RATE_STD
        rate = 1.0 + MASK_RATE_STD * jax.random.truncated_normal(rng, low, 0.0)
        length = self.network.length
        num_masked = jnp.ceil(length * rate).astype(jnp.int32)
        return length - jnp.clip(num_masked, length - self.max_visible, length)


def random_orders(rng: Key[Array, ""], num_rows: int, length: int) -> Int[Array, "b l"]:
    """A permutation of the positions for each row."""
    return jnp.argsort(jax.random.uniform(rng, (num_rows, length)), axis=-1)


def in_order(tokens: Float[Array, "b l c"], order: Int[Array, "b l"]) -> Float[Array, "b l c"]:
    """Tokens of the grid in generation order."""
    return jnp.take_along_axis(tokens, order[..., None], axis=1)


def in_grid(tokens: Float[Array, "b l c"], order: Int[Array, "b l"]) -> Float[Array, "b l c"]:
    """Tokens in generation order back on the grid, undoing `in_order`."""
    return jnp.take_along_axis(tokens, jnp.argsort(order, axis=-1)[..., None], axis=1)
