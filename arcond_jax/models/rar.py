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
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, Float, Int, Key

from arcond_jax import types
from arcond_jax.nn import attention, causal, linear, mlp, norm, parameter, stack

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


def modulate(
    x: Float[Array, "b l d"], shift: Float[Array, "b l d"], scale: Float[Array, "b l d"]
) -> Float[Array, "b l d"]:
    """Shifts and scales each normalised token on its own."""
    return x * (1.0 + scale) + shift


def modulation(num: int, width: int, dtype: DTypeLike, name: str | None = None) -> linear.Linear:
    """Map of what modulates to `num` vectors, zero at first (adaLN-zero).

    Its output must be constrained to the batch axes. Left cut over a tensor axis it is multiplied
    with the wrong pieces on meshes that cut the batch too (seen with jaxlib 0.10.2).
    """
    axes = ("embed", None, "mlp")
    return linear.Linear((num, width), axes, True, parameter.zeros_init, dtype, name=name)


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
        parts = linear.constrain_batch(modulation(6, d, self.dtype, name="modulation")(modulator))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (parts[..., i, :] for i in range(6))

        features = (3, self.num_heads, d // self.num_heads)
        axes = ("embed", None, "heads", None)
        y = modulate(norm.LayerNorm(name="attention_norm")(x), shift, scale)
        qkv = linear.Linear(features, axes, True, dtype=self.dtype, name="qkv")(y)
        queries, keys, values = (qkv[..., i, :, :] for i in range(3))
        queries = norm.LayerNorm(name="query_norm")(queries)
        keys = norm.LayerNorm(name="key_norm")(keys)
        drop = None
        if self.attention_dropout and not deterministic:
            drop = nn.Dropout(self.attention_dropout, deterministic=False)
        y, cache = causal.attend(queries, keys, values, cache, layer, dropout=drop)
        y = y.reshape(b, l, d)
        y = linear.Linear((d,), ("heads", "embed"), True, dtype=self.dtype, name="out")(y)
        x = x + gate * nn.Dropout(self.dropout, deterministic=deterministic)(y)

        y = modulate(norm.LayerNorm(name="mlp_norm")(x), mlp_shift, mlp_scale)
        y = mlp.GeluMLP(
            d, self.mlp_hidden, True, dropout=self.dropout, dtype=self.dtype, name="mlp"
        )(y)
        return (linear.constrain_batch(x + mlp_gate * y), cache), None


class RAR(nn.Module):
    """The network; its loss is in `Generator`, its sampling loop `sampling.codes.CodeSampler`.

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

    def setup(self) -> None:
        length = PREFIX + self.length
        self.start_token = self._table("start_token", (self.width,), parameter.zeros_init)
        self.embed = linear.Embed(
            self.num_codes + 1 + self.num_classes + 1, self.width, dtype=self.dtype
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
        self.final_modulation = modulation(2, self.width, self.dtype)
        self.code_head = linear.Linear(
            (self.num_codes,), ("embed", "vocab"), True, dtype=self.dtype
        )

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def factor_sizes(self) -> tuple[int, ...]:
        """A code is drawn whole."""
        return (self.num_codes,)

    def null(self, label: Int[Array, " b"]) -> Int[Array, " b"]:
        """Labels that mean no class."""
        return jnp.full_like(label, self.num_classes)

    def teacher_forced(
        self, codes: Int[Array, "b n"], order: Int[Array, "b l"], label: Int[Array, " b"]
    ) -> Float[Array, "b n_plus_1 d"]:
        """Conditions of the first n + 1 positions visited, from real prefixes.

        Args:
          codes: The first n, in the order they are visited; with all of them, the last condition is
            of a position that does not exist.
          order: Grid position of the i-th code visited.
        """
        return self._run(self._sequence(codes, order, label), label, None)[0][:, 1:]

    def start(self, label: Int[Array, " b"]) -> tuple[Float[Array, "b d"], attention.Cache]:
        """Condition of the first position in raster order, and the cache it leaves."""
        b = label.shape[0]
        cache = attention.empty_cache(
            depth=self.depth,
            batch=b,
            length=PREFIX + self.length,
            kv_heads=self.num_heads,
            head_dim=self.width // self.num_heads,
            dtype=self.dtype,
        )
        order = raster_orders(b, self.length)
        x = self._sequence(jnp.zeros((b, 0), jnp.int32), order, label)
        cond, cache = self._run(x, label, cache)
        assert cache is not None
        return cond[:, -1], cache

    def advance(
        self,
        factors: Int[Array, "b 1"],
        position: Int[Array, ""],
        label: Int[Array, " b"],
        cache: attention.Cache,
    ) -> tuple[Float[Array, "b d"], attention.Cache]:
        """Condition of the position after `position`, whose code is given, in raster order."""
        x = self.embed(factors) + self._rows(self.position, position)
        x = x + self._rows(self.next_position, position + 1)
        cond, filled = self._run(x, label, cache)
        assert filled is not None
        return cond[:, 0], filled

    def factor_logits(
        self, cond: Float[Array, "*n d"], factors: Int[Array, "*n i"]
    ) -> Float[Array, "*n v"]:
        """Logits of the code; there is no factor before it."""
        del factors
        return self.code_head(cond).astype(jnp.float32)

    def join(self, factors: Int[Array, "*n 1"]) -> Int[Array, "*n"]:
        """The code is its only factor."""
        return factors[..., 0]

    def touch_all(self, label: Int[Array, " b"]) -> None:
        """Runs every part once, for initialisation."""
        order = raster_orders(label.shape[0], self.length)
        cond = self.teacher_forced(jnp.zeros_like(order), order, label)
        self.factor_logits(cond, jnp.zeros((*cond.shape[:-1], 0), jnp.int32))

    def _class_row(self, label: Int[Array, " b"]) -> Float[Array, "b 1 d"]:
        return self.embed(self.num_codes + 1 + label)[:, None]

    def _sequence(
        self, codes: Int[Array, "b n"], order: Int[Array, "b l"], label: Int[Array, " b"]
    ) -> Float[Array, "b m d"]:
        """The prefix and the codes, each told its position and the next one."""
        b, n = codes.shape
        start = jnp.broadcast_to(self.start_token.astype(self.dtype), (b, 1, self.width))
        x = jnp.concatenate([start, self._class_row(label), self.embed(codes)], axis=1)
        of_prefix = jnp.broadcast_to(self.position[:PREFIX], (b, PREFIX, self.width))
        of_codes = self._rows(self.position, order[:, :n])
        x = x + jnp.concatenate([of_prefix.astype(x.dtype), of_codes], axis=1)
        # The class is told the first position; the start, and a last code, none.
        told = self._rows(self.next_position, order[:, : n + 1])
        rest = n + PREFIX - 1 - told.shape[1]
        return x + jnp.pad(told, ((0, 0), (1, rest), (0, 0)))

    def _run(
        self,
        x: Float[Array, "b m d"],
        label: Int[Array, " b"],
        cache: attention.Cache | None,
    ) -> tuple[Float[Array, "b m d"], attention.Cache | None]:
        """The tokens after those in `cache`, to conditions."""
        first = jnp.zeros((), jnp.int32) if cache is None else cache.index
        places = jax.lax.dynamic_slice_in_dim(self.modulator_position, first, x.shape[1])
        modulator = jax.nn.silu(self._class_row(label) + places.astype(self.dtype))
        (x, cache), _ = self.blocks((x, cache), jnp.arange(self.depth), modulator)
        if cache is not None:
            cache = dataclasses.replace(cache, index=cache.index + x.shape[1])
        parts = linear.constrain_batch(self.final_modulation(modulator))
        # Scale before shift, other than in the blocks.
        return modulate(self.final_norm(x), parts[..., 1, :], parts[..., 0, :]), cache

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
        return parameter.parameter(self, name, init, shape, axes)


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Initialisation and training loss of `RAR`; implements `types.Generator`.

    Attributes:
      network: The Linen module.
      label_dropout: Chance that a sample is trained without its class.
      shuffle_start, shuffle_stop: Training steps between which the share of samples visited in a
        random order falls from 1 to 0, the rest being in raster order; None keeps it at 1.

    Raises:
      ValueError: one of the two steps alone, or a stop that is not after the start.
    """

    network: RAR
    label_dropout: float = 0.1
    shuffle_start: int | None = None
    shuffle_stop: int | None = None

    def __post_init__(self) -> None:
        start, stop = self.shuffle_start, self.shuffle_stop
        if (start is None) != (stop is None):
            raise ValueError(f"shuffle_start {start} and shuffle_stop {stop}: give both or none")
        if start is not None and stop is not None and start >= stop:
            raise ValueError(f"shuffle_start {start} must be less than shuffle_stop {stop}")

    def init(self, rng: Key[Array, ""]) -> types.Params:
        """Parameters, boxed with their logical axis names."""
        label = jnp.zeros((1,), jnp.int32)
        return self.network.init(rng, label, method=RAR.touch_all)["params"]

    def apply(self, params: types.Params, *args: Any, method: Callable, **options: Any) -> Any:
        """Runs a method of the network."""
        return self.network.apply({"params": params}, *args, method=method, **options)

    def loss(
        self,
        params: types.Params,
        tokens: types.Tokens,
        label: Int[Array, " b"],
        rng: Key[Array, ""],
        *,
        step: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, ""], types.Metrics]:
        """Mean cross-entropy in nats of every code after those visited before it."""
        codes = _codes(tokens)
        order_rng, rate_rng, drop_rng, dropout_rng = jax.random.split(rng, 4)
        dropped = jax.random.bernoulli(drop_rng, self.label_dropout, label.shape)
        label = jnp.where(dropped, self.network.num_classes, label)
        shuffled = jax.random.bernoulli(rate_rng, self._shuffle_rate(step), label.shape)
        order = jnp.where(
            shuffled[:, None],
            jnp.argsort(jax.random.uniform(order_rng, codes.shape), axis=-1),
            raster_orders(*codes.shape),
        )
        visited = jnp.take_along_axis(codes, order, axis=1)
        logits = self.logits(params, visited[:, :-1], order, label, rngs={"dropout": dropout_rng})
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, visited))
        return loss, {"loss": loss, "cross_entropy": loss, "shuffled": jnp.mean(shuffled)}

    def logits(
        self,
        params: types.Params,
        codes: Int[Array, "b n"],
        order: Int[Array, "b l"],
        label: Int[Array, " b"],
        **options: Any,
    ) -> Float[Array, "b n_plus_1 v"]:
        """Logits at the conditions of `RAR.teacher_forced`."""

        def run(network: RAR) -> Float[Array, "b n_plus_1 v"]:
            cond = network.teacher_forced(codes, order, label)
            return network.factor_logits(cond, jnp.zeros((*cond.shape[:-1], 0), jnp.int32))

        return self.apply(params, method=run, **options)

    def conditions(
        self,
        params: types.Params,
        tokens: types.Tokens,
        label: Int[Array, " b"],
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "b l d"]:
        """Conditions of all positions in raster order, as sampling sees them; nothing is drawn."""
        del rng
        codes = _codes(tokens)
        order = raster_orders(*codes.shape)
        return self.apply(params, codes[:, :-1], order, label, method=RAR.teacher_forced)

    def _shuffle_rate(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        if self.shuffle_start is None or self.shuffle_stop is None:
            return jnp.ones(())
        return annealed_shuffle_rate(step, start=self.shuffle_start, stop=self.shuffle_stop)


def raster_orders(num_rows: int, length: int) -> Int[Array, "b l"]:
    """Every row visits its positions row by row of the grid."""
    return jnp.broadcast_to(jnp.arange(length), (num_rows, length))


def annealed_shuffle_rate(step: Int[Array, ""] | int, *, start: int, stop: int) -> Float[Array, ""]:
    """1 until training step `start`, then down to 0 at `stop` along a line.

    Source: RAR, utils/train_utils.py, `get_rar_random_ratio`; 125000 to 187500 of 250000 steps
    there.
    """
    share = (jnp.asarray(step) - start) / (stop - start)
    return jnp.clip(1.0 - share, 0.0, 1.0)


def _codes(tokens: types.Tokens) -> Int[Array, "b l"]:
    if tokens.codes is None:
        raise ValueError("RAR models codes, and these tokens hold none")
    return tokens.codes
