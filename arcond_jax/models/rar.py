"""RAR: a causal transformer over codes, trained in random orders and in raster order at last.

The sequence is [start, class, codes in the order they are visited]. A token is told where it lies
and where the next one lies, so that one network serves every order; every block is shifted, scaled
and gated by the class and the place in the sequence. The condition of a position is what the head
maps to its logits.

Source: RAR (Yu et al., 2024, "Randomized Autoregressive Visual Generation"), modeling/rar.py. The
classes follow the codes in one table there and here, with the row of a mask token that is never
fed between them.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Key

from arcond_jax import placement, types
from arcond_jax.models import causal
from arcond_jax.nn import attention, linear, mlp, modulation, norm, parameter, stack
from arcond_jax.nn import causal as causal_attention

# README_RAR.md, "Testing on ImageNet-1K Benchmark"; RAR (2024), table 1.
SIZES = {
    "B": dict(depth=24, width=768, num_heads=16, mlp_hidden=3072),
    "L": dict(depth=24, width=1024, num_heads=16, mlp_hidden=4096),
    "XL": dict(depth=32, width=1280, num_heads=16, mlp_hidden=5120),
    "XXL": dict(depth=40, width=1408, num_heads=16, mlp_hidden=6144),
}

PREFIX = 2  # tokens before the codes: the start and the class
# Rows of the released tables beyond those that are used.
SPARE_POSITIONS, SPARE_MODULATORS = 1024 - PREFIX, 100 - PREFIX


class Block(nn.Module):
    """Causal attention with normalised queries and keys, and exact-GELU MLP, both modulated.

    Scanned over layers, so it carries (x, cache). Dropout acts where a "dropout" rng is given.
    """

    num_heads: int
    mlp_hidden: int
    attention_dropout: float
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "b l d"], attention.Cache | None],
        layer: Int[Array, ""],
        modulator: Float[Array, "b l d"],
    ) -> tuple[tuple[Float[Array, "b l d"], attention.Cache | None], None]:
        x, cache = carry
        b, l, d = x.shape
        deterministic = not self.has_rng("dropout")
        vectors = placement.constrain_batch(modulation.modulation(6, d, self.dtype)(modulator))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.parts(vectors)

        features = (3, self.num_heads, d // self.num_heads)
        axes = ("embed", None, "heads", None)
        y = norm.LayerNorm(name="attention_norm")(x)
        y = modulation.modulate(y, shift, scale)
        qkv = linear.Linear(features, axes, True, dtype=self.dtype, name="qkv")(y)
        queries, keys, values = (qkv[..., i, :, :] for i in range(3))
        queries = norm.LayerNorm(name="query_norm")(queries)
        keys = norm.LayerNorm(name="key_norm")(keys)
        drop = None
        if self.attention_dropout and not deterministic:
            drop = nn.Dropout(self.attention_dropout, deterministic=False)
        y, cache = causal_attention.attend(queries, keys, values, cache, layer, dropout=drop)
        y = y.reshape(b, l, d)
        y = linear.Linear((d,), ("heads", "embed"), True, dtype=self.dtype, name="out")(y)
        x = x + gate * nn.Dropout(self.dropout, deterministic=deterministic)(y)

        y = modulation.modulate(norm.LayerNorm(name="mlp_norm")(x), mlp_shift, mlp_scale)
        y = mlp.GeluMLP(
            d, self.mlp_hidden, True, dropout=self.dropout, dtype=self.dtype, name="mlp"
        )(y)
        return (placement.constrain_batch(x + mlp_gate * y), cache), None


class RAR(nn.Module):
    """The network, a `types.CausalModel` of codes; its loss is in `Generator`.

    Attributes:
      grid: Rows and columns of the token grid.
      num_codes: Size of the codebook.
      num_classes: Classes; id `num_classes` means none.
      mlp_hidden: Width inside the MLP.
      attention_dropout, dropout: In training, of attention weights and of residual branches.
      remat, unroll: As in `nn.stack.scanned`.
    """

    grid: tuple[int, int]
    num_codes: int
    num_classes: int
    depth: int
    width: int
    num_heads: int
    mlp_hidden: int
    attention_dropout: float = 0.1
    dropout: float = 0.1
    remat: str = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    normalised: ClassVar[bool] = True  # conditions are of unit size

    def setup(self) -> None:
        length = PREFIX + self.length
        self.start_token = self._table("start_token", (self.width,), parameter.zeros_init)
        self.code_embed = linear.Embed(
            self.num_codes + 1 + self.num_classes + 1, self.width, dtype=self.dtype, name="embed"
        )
        self.position = self._table("position", (length + SPARE_POSITIONS, self.width))
        self.next_position = self._table("next_position", (length + SPARE_POSITIONS, self.width))
        self.modulator_position = self._table(
            "modulator_position", (length + SPARE_MODULATORS, self.width)
        )
        blocks = stack.scanned(
            Block,
            depth=self.depth,
            remat=self.remat,
            unroll=self.unroll,
            in_axes=(0, nn.broadcast),
        )
        self.blocks = blocks(
            num_heads=self.num_heads,
            mlp_hidden=self.mlp_hidden,
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            dtype=self.dtype,
        )
        self.final_norm = norm.LayerNorm(use_affine=False)
        self.final_modulation = modulation.modulation(2, self.width, self.dtype, name=None)
        self.code_head = linear.Linear(
            (self.num_codes,), ("embed", "vocab"), True, dtype=self.dtype
        )

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def window(self) -> int:
        return 1

    @property
    def factor_sizes(self) -> tuple[int, ...]:
        """A code is drawn whole."""
        return (self.num_codes,)

    @property
    def channels(self) -> None:
        """There are no latents."""
        return None

    @property
    def unrolled(self) -> bool:
        return self.unroll >= self.depth

    def no_prompt(self, num_rows: int) -> Int[Array, " b"]:
        """Rows that ask for nothing."""
        return jnp.full((num_rows,), self.num_classes, jnp.int32)

    def null(self, prompt: Int[Array, " b"]) -> Int[Array, " b"]:
        """Labels that mean no class."""
        return jnp.full_like(prompt, self.num_classes)

    def empty_cache(self, prompt: Int[Array, " b"], spare: int = 0) -> attention.Cache:
        """With room for `spare` places beyond the end."""
        return attention.empty_cache(
            depth=self.depth,
            batch=prompt.shape[0],
            length=PREFIX + self.length + spare,
            kv_heads=self.num_heads,
            head_dim=self.width // self.num_heads,
            dtype=self.dtype,
            unrolled=self.unrolled,
        )

    def prefix(
        self, prompt: Int[Array, " b"], at: Int[Array, "*b 1"]
    ) -> tuple[Float[Array, "b 2 d"], Int[Array, "*b 2"]]:
        """The start and the class, which is told the first position."""
        start = jnp.broadcast_to(
            self.start_token.astype(self.dtype), (prompt.shape[0], 1, self.width)
        )
        places = self.position[:PREFIX].astype(self.dtype)
        label = self._class_row(prompt) + places[1] + self._rows(self.next_position, at)
        x = jnp.concatenate([start + places[0], label], axis=1)
        return x, jnp.concatenate([jnp.full_like(at, -1), at], axis=-1)

    def embed(self, token: types.Token, at: Int[Array, "*b n_plus_w"]) -> Float[Array, "b n d"]:
        """Codes, each told its position and the next one."""
        assert token.codes is not None
        n = token.codes.shape[1]
        x = self.code_vectors(token.codes[..., 0, :]) + self._rows(self.position, at[..., :n])
        return x + self._rows(self.next_position, at[..., 1 : n + 1])

    def advance(
        self,
        x: Float[Array, "b n d"],
        about: Int[Array, "*b n"],
        prompt: Int[Array, " b"],
        cache: attention.Cache | None,
    ) -> tuple[Float[Array, "b n d"], attention.Cache | None]:
        """The tokens after those in `cache`, to conditions; they know what they are about."""
        del about
        places = causal_attention.rows_of(self.modulator_position, cache, x.shape[1])
        modulator = jax.nn.silu(self._class_row(prompt) + places.astype(self.dtype))
        (x, cache), _ = self.blocks((x, cache), jnp.arange(self.depth), modulator)
        if cache is not None:
            cache = dataclasses.replace(cache, index=cache.index + x.shape[1])
        vectors = placement.constrain_batch(self.final_modulation(modulator))
        scale, shift = modulation.parts(vectors)  # in this order, other than in the blocks
        return modulation.modulate(self.final_norm(x), shift, scale), cache

    def rows(self, cond: Float[Array, "*n d"], at: Int[Array, "*m 1"]) -> Float[Array, "*n 1 d"]:
        """The condition itself: the window is one code."""
        del at
        return cond[..., None, :]

    def factor_logits(
        self, row: Float[Array, "*n d"], factors: Int[Array, "*n i"]
    ) -> Float[Array, "*n v"]:
        """Logits of the code; there is no factor before it."""
        del factors
        return self.code_head(row).astype(jnp.float32)

    def all_factor_logits(
        self, row: Float[Array, "*n d"], factors: Int[Array, "*n 1"]
    ) -> list[Float[Array, "*n v"]]:
        """The same, in a list of one."""
        return [self.factor_logits(row, factors)]

    def code_vectors(self, codes: Int[Array, "*n 1"]) -> Float[Array, "*n d"]:
        return self.code_embed(codes[..., 0])

    def where(self, at: Int[Array, "*n"]) -> tuple[Float[Array, "*n d"], Float[Array, "*n d"]]:
        """Rows of the tables of positions: of a token's own, and of the one that comes next."""
        return self._rows(self.position, at), self._rows(self.next_position, at)

    def _class_row(self, label: Int[Array, " b"]) -> Float[Array, "b 1 d"]:
        return self.code_embed(self.num_codes + 1 + label)[:, None]

    def _rows(self, table: Array, places: Int[Array, "*n"]) -> Float[Array, "*n d"]:
        """Rows of a position table for positions of the grid."""
        return table[PREFIX + places].astype(self.dtype)

    def _table(
        self,
        name: str,
        shape: tuple[int, ...],
        init: parameter.Initializer = parameter.normal_init,
    ) -> Array:
        axes = (None,) * (len(shape) - 1) + ("embed",)
        return parameter.parameter(self, name, init, shape, axes, self.dtype, looked_up=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Generator(causal.Generator):
    """Training in random orders that are annealed to raster order.

    Attributes:
      shuffle_start, shuffle_stop: Training steps between which the share of samples visited in a
        random order falls from 1 to 0, the rest being in raster order; None keeps it at 1.

    And those of `causal.Generator`.

    Raises:
      ValueError: one of the two steps alone, or a stop that is not after the start.
    """

    shuffle_start: int | None = None
    shuffle_stop: int | None = None

    streams = ("orders", "rate", "prompt", "dropout", "windows", "latents")

    def __post_init__(self) -> None:
        start, stop = self.shuffle_start, self.shuffle_stop
        if (start is None) != (stop is None):
            raise ValueError(f"shuffle_start {start} and shuffle_stop {stop}: give both or none")
        if start is not None and stop is not None and start >= stop:
            raise ValueError(f"shuffle_start {start} must be less than shuffle_stop {stop}")

    def visited(
        self, num_rows: int, rngs: dict[str, Key[Array, ""]], step: Int[Array, ""] | int
    ) -> tuple[Int[Array, "b l"], types.Metrics]:
        """Positions in the order each row visits them, and the share of random orders."""
        shape = (num_rows, self.network.length)
        shuffled = jax.random.bernoulli(rngs["rate"], self._shuffle_rate(step), shape[:1])
        at = jnp.where(
            shuffled[:, None],
            jnp.argsort(jax.random.uniform(rngs["orders"], shape), axis=-1),
            jnp.arange(self.network.length),
        )
        return at, {"shuffled": jnp.mean(shuffled)}

    def _shuffle_rate(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        if self.shuffle_start is None or self.shuffle_stop is None:
            return jnp.ones(())
        return annealed_shuffle_rate(step, start=self.shuffle_start, stop=self.shuffle_stop)


def annealed_shuffle_rate(step: Int[Array, ""] | int, *, start: int, stop: int) -> Float[Array, ""]:
    """1 until training step `start`, then down to 0 at `stop` along a line.

    Source: RAR, utils/train_utils.py, `get_rar_random_ratio`; 125000 to 187500 of 250000 steps
    there.
    """
    share = (jnp.asarray(step) - start) / (stop - start)
    return jnp.clip(1.0 - share, 0.0, 1.0)
