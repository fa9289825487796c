"""Open-MAGVIT2's generator: LlamaGen's blocks over positions, and a few more over the bits of one.

A code is so large that it is predicted in factors, low bits first. The trunk runs over [class,
codes], where a code is the sum of the embeddings of its factors; its output is the condition of the
next position. From there a small causal stack runs over [condition, factors but the last], one
output for each factor.

Source: Luo et al. (2024), "Open-MAGVIT2"; TencentARC/SEED-Voken,
src/Open_MAGVIT2/modules/transformer/gpt.py.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from arcond_jax import types
from arcond_jax.models import gpt
from arcond_jax.nn import attention, linear, norm, parameter

# configs/Open-MAGVIT2/gpu/imagenet_conditional_llama_{B,L,XL}.yaml.
SIZES = {
    "B": dict(depth=24, width=1024, num_heads=16, intra_depth=2),
    "L": dict(depth=36, width=1280, num_heads=20, intra_depth=3),
    "XL": dict(depth=48, width=1536, num_heads=24, intra_depth=4),
}
FACTOR_SIZES = (2**6, 2**12)  # `factorized_bits` of the same files


class MAGVIT2(nn.Module):
    """The network; its loss is in `Generator`, its sampling loop `sampling.codes.CodeSampler`.

    Attributes:
      backbone: Unbound stack of causal blocks with a prefix of one, the class. The blocks over
        factors share its dropouts; the official recipe has `dropout` 0.1 (`resid_dropout_p` of the
        configs, `ffn_dropout_p` of gpt.py) and none of attention weights.
      num_classes: Classes; id `num_classes` means none.
      factor_sizes: Values of each factor of a code, the lowest bits first.
      intra_depth: Blocks over the factors of one code.
      token_dropout: In training, of the embedded tokens, the class included.
    """

    backbone: gpt.GPT
    num_classes: int
    factor_sizes: tuple[int, ...] = FACTOR_SIZES
    intra_depth: int = 2
    token_dropout: float = 0.1

    def setup(self) -> None:
        width, dtype = self.backbone.width, self.backbone.dtype
        self.class_embed = linear.Embed(self.num_classes + 1, width, dtype=dtype)
        self.factor_embed = [linear.Embed(size, width, dtype=dtype) for size in self.factor_sizes]
        self.drop = nn.Dropout(self.token_dropout)
        self.trunk = self.backbone.clone()
        # The condition has the positions of the class token, the factors those of the first row.
        self.intra = self.backbone.clone(
            depth=self.intra_depth, grid=(1, len(self.factor_sizes) - 1), unroll=1
        )
        self.final_norm = norm.RMSNorm()
        self.factor_head = [
            linear.Linear(
                (size,), ("embed", "vocab"), kernel_init=parameter.zeros_init, dtype=dtype
            )
            for size in self.factor_sizes
        ]

    @property
    def length(self) -> int:
        return self.backbone.grid[0] * self.backbone.grid[1]

    @property
    def num_codes(self) -> int:
        """Ids there are."""
        return math.prod(self.factor_sizes)

    def null(self, label: Int[Array, " b"]) -> Int[Array, " b"]:
        """Labels that mean no class."""
        return jnp.full_like(label, self.num_classes)

    def split(self, codes: Int[Array, "*n"]) -> Int[Array, "*n factors"]:
        """Factors of an id; for powers of two what `tokenizers.lfq.factorize` gives."""
        strides = self._strides()
        return (codes[..., None] // strides) % np.array(self.factor_sizes, np.int32)

    def join(self, factors: Int[Array, "*n factors"]) -> Int[Array, "*n"]:
        """Undoes `split`."""
        return jnp.sum(factors * self._strides(), axis=-1, dtype=factors.dtype)

    def teacher_forced(
        self, factors: Int[Array, "b l factors"], label: Int[Array, " b"]
    ) -> Float[Array, "b l d"]:
        """Conditions of all positions from real prefixes."""
        x = jnp.concatenate([self._class_token(label), self._embed(factors[:, :-1])], axis=1)
        return self.trunk(self.drop(x, deterministic=not self.has_rng("dropout")))[0]

    def start(self, label: Int[Array, " b"]) -> tuple[Float[Array, "b d"], attention.Cache]:
        """Condition of the first position, and the cache it leaves."""
        return self._next(self._class_token(label), self.backbone.empty_cache(label.shape[0]))

    def advance(
        self,
        factors: Int[Array, "b factors"],
        position: Int[Array, ""],
        label: Int[Array, " b"],
        cache: attention.Cache,
    ) -> tuple[Float[Array, "b d"], attention.Cache]:
        """Condition of the position after the one whose factors are given."""
        del position, label  # the cache knows both
        return self._next(self._embed(factors[:, None]), cache)

    def factor_logits(
        self, cond: Float[Array, "*n d"], factors: Int[Array, "*n i"]
    ) -> Float[Array, "*n v"]:
        """Logits of the factor that follows the given ones.

        The few tokens before it are run again: their cache would cost as many passes over the
        weights.
        """
        rows = self._intra_rows(cond, factors)
        return self._head(rows[..., -1, :], factors.shape[-1])

    def all_factor_logits(
        self, cond: Float[Array, "*n d"], factors: Int[Array, "*n factors"]
    ) -> list[Float[Array, "*n v"]]:
        """Logits of every factor given the real ones before it."""
        rows = self._intra_rows(cond, factors[..., :-1])
        return [self._head(rows[..., i, :], i) for i in range(len(self.factor_sizes))]

    def touch_all(self, label: Int[Array, " b"]) -> None:
        """Runs every part once, for initialisation."""
        factors = jnp.zeros((label.shape[0], self.length, len(self.factor_sizes)), jnp.int32)
        self.all_factor_logits(self.teacher_forced(factors, label), factors)

    def _strides(self) -> Int[np.ndarray, " factors"]:
        return np.cumprod([1, *self.factor_sizes[:-1]], dtype=np.int32)

    def _class_token(self, label: Int[Array, " b"]) -> Float[Array, "b 1 d"]:
        return self.class_embed(label)[:, None]

    def _embed(self, factors: Int[Array, "b n factors"]) -> Float[Array, "b n d"]:
        parts = [embed(factors[..., i]) for i, embed in enumerate(self.factor_embed)]
        return sum(parts[1:], start=parts[0])

    def _next(
        self, x: Float[Array, "b 1 d"], cache: attention.Cache
    ) -> tuple[Float[Array, "b d"], attention.Cache]:
        cond, filled = self.trunk(x, cache)
        assert filled is not None
        return cond[:, 0], filled

    def _intra_rows(
        self, cond: Float[Array, "*n d"], factors: Int[Array, "*n i"]
    ) -> Float[Array, "*n i_plus_1 d"]:
        told = [self.factor_embed[i](factors[..., i]) for i in range(factors.shape[-1])]
        x = jnp.stack([cond, *told], axis=-2)
        rows = self.intra(x.reshape(-1, *x.shape[-2:]))[0]
        return self.final_norm(rows).reshape(x.shape)

    def _head(self, row: Float[Array, "*n d"], i: int) -> Float[Array, "*n v"]:
        return self.factor_head[i](row).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Initialisation and training loss of `MAGVIT2`; implements `types.Generator`.

    Attributes:
      network: The Linen module.
      label_dropout: Chance that a sample is trained without its class.
    """

    network: MAGVIT2
    label_dropout: float = 0.1

    def init(self, rng: Key[Array, ""]) -> types.Params:
        """Parameters, boxed with their logical axis names."""
        label = jnp.zeros((1,), jnp.int32)
        return self.network.init(rng, label, method=MAGVIT2.touch_all)["params"]

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
        """Cross-entropy in nats, averaged over positions and summed over factors."""
        del step
        drop_rng, dropout_rng = jax.random.split(rng)
        dropped = jax.random.bernoulli(drop_rng, self.label_dropout, label.shape)
        label = jnp.where(dropped, self.network.num_classes, label)
        factors = self.network.split(_codes(tokens))
        logits = self.logits(params, factors, label, rngs={"dropout": dropout_rng})
        parts = [
            jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, factors[..., i]))
            for i, x in enumerate(logits)
        ]
        total = sum(parts[1:], start=parts[0])
        return total, {"loss": total} | {
            f"cross_entropy/factor_{i}": part for i, part in enumerate(parts)
        }

    def logits(
        self,
        params: types.Params,
        factors: Int[Array, "b l factors"],
        label: Int[Array, " b"],
        **options: Any,
    ) -> list[Float[Array, "b l v"]]:
        """Logits of every factor of every position from real prefixes."""

        def run(network: MAGVIT2) -> list[Float[Array, "b l v"]]:
            return network.all_factor_logits(network.teacher_forced(factors, label), factors)

        return self.apply(params, method=run, **options)

    def conditions(
        self,
        params: types.Params,
        tokens: types.Tokens,
        label: Int[Array, " b"],
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "b l d"]:
        """Conditions of all positions, as sampling sees them; nothing is drawn."""
        del rng
        factors = self.network.split(_codes(tokens))
        return self.apply(params, factors, label, method=MAGVIT2.teacher_forced)


def _codes(tokens: types.Tokens) -> Int[Array, "b l"]:
    if tokens.codes is None:
        raise ValueError("Open-MAGVIT2 models codes, and these tokens hold none")
    return tokens.codes
