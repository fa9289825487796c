"""Causal transformer over [prefix, raster tokens]: embeddings in, hidden states out.

The block is LlamaGen's (Sun et al., 2024, "Autoregressive Model Beats Diffusion"; official
autoregressive/models/gpt.py): RMSNorm, rotary positions in two dimensions, SwiGLU, no biases.
What is embedded and what is predicted belongs to the models that use it.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from arcond_jax import placement
from arcond_jax.nn import attention, causal, linear, mlp, norm, rope, stack

# LlamaGen's table (Sun et al., 2024, table 1).
SIZES = {
    "B": dict(depth=12, width=768, num_heads=12),
    "L": dict(depth=24, width=1024, num_heads=16),
    "XL": dict(depth=36, width=1280, num_heads=20),
    "XXL": dict(depth=48, width=1536, num_heads=24),
    "3B": dict(depth=24, width=3200, num_heads=32),
}


class Block(nn.Module):
    """Pre-norm causal attention and SwiGLU.

    Scanned over layers, so it carries (x, cache). Dropout acts where a "dropout" rng is given.
    """

    num_heads: int
    num_kv_heads: int
    mlp_hidden: int
    qk_norm: bool
    attention_dropout: float
    dropout: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "b l d"], attention.Cache | None],
        layer: Int[Array, ""],
        table: Float[Array, "*b l pairs 2"],
        visible: Bool[Array, "b places"] | None,
    ) -> tuple[tuple[Float[Array, "b l d"], attention.Cache | None], None]:
        x, cache = carry
        b, l, d = x.shape
        head_dim = d // self.num_heads
        groups = self.num_heads // self.num_kv_heads
        deterministic = not self.has_rng("dropout")
        drop = nn.Dropout(self.dropout, deterministic=deterministic)

        y = norm.RMSNorm(name="attention_norm")(x)
        # Each key-value head beside its query heads: a tensor-parallel mesh cuts between heads.
        qkv = linear.Linear(
            (self.num_kv_heads, groups + 2, head_dim),
            ("embed", "heads", None, None),
            dtype=self.dtype,
            name="qkv",
        )(y)
        queries = qkv[..., :groups, :].reshape(b, l, self.num_heads, head_dim)
        keys, values = qkv[..., groups, :], qkv[..., groups + 1, :]
        if self.qk_norm:
            queries = norm.RMSNorm(axis_name=None, name="query_norm")(queries)
            keys = norm.RMSNorm(axis_name=None, name="key_norm")(keys)
        queries, keys = rope.rotate(queries, table), rope.rotate(keys, table)

        attend_drop = None
        if self.attention_dropout and not deterministic:
            attend_drop = nn.Dropout(self.attention_dropout, deterministic=False)
        y, cache = causal.attend(
            queries, keys, values, cache, layer, visible=visible, dropout=attend_drop
        )
        y = y.reshape(b, l, d)
        x = x + drop(linear.Linear((d,), ("heads", "embed"), dtype=self.dtype, name="out")(y))

        y = norm.RMSNorm(name="mlp_norm")(x)
        x = x + drop(mlp.SwiGLU(d, self.mlp_hidden, dtype=self.dtype, name="mlp")(y))
        return (placement.constrain_batch(x), cache), None


class GPT(nn.Module):
    """The stack of blocks; its output is not yet normalised.

    Attributes:
      grid: Rows and columns of the token grid; positions beyond prefix + grid do not exist.
      num_prefix: Tokens before the grid (1: the class).
      num_kv_heads: None for as many as `num_heads`.
      mlp_hidden: Width inside SwiGLU; None for LlamaGen's rule.
      dropout: In training, of what attention and SwiGLU add to the stream. LlamaGen trains with 0.1
        (`--dropout-p` of train_c2i.py), without dropout of attention weights or of whole branches.
      attention_dropout: In training, of attention weights.
      remat: "none", "full" (recompute blocks in the backward pass) or "dots" (keep weight
        products).
      unroll: Layers per iteration of the scan; `depth` unrolls it. Same parameters either way.
    """

    depth: int
    width: int
    num_heads: int
    grid: tuple[int, int]
    num_prefix: int = 1
    num_kv_heads: int | None = None
    mlp_hidden: int | None = None
    qk_norm: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    remat: str = "none"
    unroll: int = 1
    dtype: DTypeLike = jnp.float32

    @property
    def length(self) -> int:
        return self.num_prefix + self.grid[0] * self.grid[1]

    def empty_cache(self, batch: int, spare: int = 0) -> attention.Cache:
        """With room for `spare` places beyond the end."""
        return attention.empty_cache(
            depth=self.depth,
            batch=batch,
            length=self.length + spare,
            kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.width // self.num_heads,
            dtype=self.dtype,
            unrolled=self.unroll >= self.depth,
        )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        cache: attention.Cache | None = None,
        visible: Bool[Array, "b places"] | None = None,
    ) -> tuple[Float[Array, "b l d"], attention.Cache | None]:
        """Runs the tokens after those in `cache`; without a cache, from the first place on.

        `visible` is False at places that only they themselves may see; None for none.
        """
        table = jnp.asarray(
            rope.rope_table(self.grid, self.width // self.num_heads, num_prefix=self.num_prefix)
        )
        table = causal.rows_of(table, cache, x.shape[1])

        blocks = stack.scanned(
            Block,
            depth=self.depth,
            remat=self.remat,
            unroll=self.unroll,
            in_axes=(0, nn.broadcast, nn.broadcast),
        )(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            mlp_hidden=self.mlp_hidden or mlp.swiglu_hidden(self.width),
            qk_norm=self.qk_norm,
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            dtype=self.dtype,
            name="blocks",
        )
        layers = jnp.arange(self.depth)
        (x, cache), _ = blocks((x.astype(self.dtype), cache), layers, table, visible)
        if cache is not None:
            cache = dataclasses.replace(cache, index=cache.index + x.shape[1])
        return x, cache
