"""Next-tensor prediction around any causal model of codes: windows, their noise, transformers.

Window i is (y_i, ..., y_{i+w-1}). The input encoder folds a window into one vector that is added to
the embedded token, the output decoder unfolds a condition into a row for each entry; both start as
the identity of the plain autoregressive model, which window 1 always is.

Source: "TensorAR: Refinement is All You Need in Autoregressive Image Generation" (arXiv v1, May
2025, and ICLR 2026). The two versions differ: v1 has two plain transformer blocks on each side
and noise through the tokenizer's codebook, ICLR one attention layer and categorical noise.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Key

from arcond_jax import types
from arcond_jax.nn import attention, linear, mlp, norm, parameter

NOISES = ("categorical", "codebook", "self", "none")
SHOWN = ("masked", "noised", "random")
SCHEDULES = {
    "linear": lambda u: u,
    "sine": lambda u: np.sin(np.pi * u / 2),
    "sqrt": np.sqrt,
    "exponential": lambda u: (np.exp(u) - 1.0) / (math.e - 1.0),
}


def windows(x: Array, window: int) -> Array:
    """What lies at each position of [b, l, *n] and the `window - 1` after it: [b, l, w, *n].

    Beyond the end it is 0; `inside` tells where.
    """
    padded = jnp.pad(x, ((0, 0), (0, window - 1), *[(0, 0)] * (x.ndim - 2)))
    return jnp.stack([padded[:, j : j + x.shape[1]] for j in range(window)], axis=2)


def inside(length: int, window: int) -> Bool[np.ndarray, "l w"]:
    """True where entry j of the window at position i lies within the sequence."""
    return np.arange(length)[:, None] + np.arange(window) < length


def noise_levels(schedule: str, window: int) -> Float[np.ndarray, " w"]:
    """b_j, the share of noise on entry j: 0 at entry 0, growing with j / window, never 1.

    The paper's table of formulas did not survive; these are the usual curves of those names:
    u, sin(pi u / 2), sqrt(u), (e^u - 1) / (e - 1).
    """
    return SCHEDULES[schedule](np.arange(window) / window).astype(np.float32)


def categorical_noise(
    rng: Key[Array, ""],
    codes: Int[Array, "b l factors"],
    *,
    levels: Float[np.ndarray, " w"],
    factor_sizes: tuple[int, ...],
    nested: bool = True,
) -> Int[Array, "b l w factors"]:
    """Windows whose entry j is replaced by a uniform code with probability b_j (ICLR version).

    Args:
      nested: One noise code and one threshold per token, shared by all windows that hold it, so
        the windows reveal no more together than the cleanest of them; otherwise every window draws
        afresh, and a model that sees several can vote the noise away.
    """
    window, (b, l, _) = len(levels), codes.shape
    shape = (b, l) if nested else (b, l, window)
    threshold_rng, noise_rng = jax.random.split(rng)
    threshold = jax.random.uniform(threshold_rng, shape)
    sizes = np.array(factor_sizes)
    noise = jax.random.randint(noise_rng, (*shape, len(sizes)), 0, sizes)
    if nested:
        threshold, noise = windows(threshold, window), windows(noise, window)
    return jnp.where((threshold < levels)[..., None], noise, windows(codes, window))


def codebook_noise(
    rng: Key[Array, ""],
    codes: Int[Array, "b l 1"],
    *,
    levels: Float[np.ndarray, " w"],
    codebook: Float[Array, "v c"],
    nested: bool = False,
    block_size: int = 2048,
) -> Int[Array, "b l w 1"]:
    """Windows whose entry j is the code nearest to a mix of its vector and a random one's (v1).

    Nearest by cosine in the tokenizer's codebook, (1 - b_j) W[x] + b_j W[n] with n uniform; never
    in the model's own embedding, whose near-orthogonal rows would make it a hard switch.

    Args:
      codebook: The tokenizer's vectors; centred if they have a common direction (raw pixels do).
      nested: As in `categorical_noise`; the paper draws for every window.
      block_size: Tokens looked up at a time: the score matrix is never larger than that times v.
    """
    window = len(levels)
    rows = codebook / jnp.maximum(jnp.linalg.norm(codebook, axis=-1, keepdims=True), 1e-12)
    clean = windows(codes[..., 0], window)
    shape = codes.shape[:2] if nested else clean.shape
    noise = jax.random.randint(rng, shape, 0, len(codebook))
    if nested:
        noise = windows(noise, window)

    # Entry 0 is always clean, so only the others are looked up.
    old, new = (x[..., 1:].reshape(-1) for x in (clean, noise))
    level = jnp.broadcast_to(jnp.asarray(levels)[1:], clean[..., 1:].shape).reshape(-1, 1)

    def nearest(query: tuple) -> Int[Array, ""]:
        x, n, b = query
        mixed = (1.0 - b) * rows[x] + b * rows[n]
        return jnp.argmax(jnp.matmul(rows, mixed, precision="highest"))

    mixed = jax.lax.map(nearest, (old, new, level), batch_size=block_size)
    noised = jnp.concatenate([clean[..., :1], mixed.reshape(clean[..., 1:].shape)], axis=-1)
    return jax.lax.stop_gradient(noised)[..., None]


@dataclasses.dataclass(frozen=True, eq=False)
class Drafts:
    """What the windows fed in show beyond their first code, in training.

    Attributes:
      drafts: "masked" nothing, "noised" all of it noised, "random" the first few entries, a number
        drawn per position.
      noise: "categorical", "codebook", "self" (drafts the model would draw itself) or "none".
      noise_schedule: Name of the curve of noise over the entries.
      nested: Whether windows share one draw of noise per token.
      codebook: The tokenizer's vectors, centred; only noise "codebook" needs them.

    Raises:
      ValueError: A choice that does not exist.
    """

    drafts: str = "masked"
    noise: str = "categorical"
    noise_schedule: str = "exponential"
    nested: bool = True
    codebook: Float[np.ndarray, "v c"] | None = None

    def __post_init__(self) -> None:
        choices = {"drafts": SHOWN, "noise": NOISES, "noise_schedule": tuple(SCHEDULES)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )

    def __call__(
        self,
        token: types.Token,
        codes: Int[Array, "b l factors"],
        rng: Key[Array, ""],
        *,
        factor_sizes: tuple[int, ...],
        draw: Callable[[Key[Array, ""]], Int[Array, "b l w factors"]],
    ) -> types.Token:
        """The windows that are fed in the place of those of `token`, which show no draft.

        Args:
          codes: The real ones, of all positions.
          draw: The windows the model would draw, no draft shown to it. The window fed in at a
            position starts at that position's own code, so its entry j is entry j of the window
            predicted there.

        Raises:
          ValueError: The noise is "codebook", and there is none or codes have several factors.
        """
        assert token.seen is not None
        if self.drafts == "masked":
            return token
        (_, length, _), window = codes.shape, token.seen.shape[-1]
        levels = noise_levels(self.noise_schedule, window)
        noise_rng, valid_rng = jax.random.split(rng)
        if self.noise == "categorical":
            noised = categorical_noise(
                noise_rng, codes, levels=levels, factor_sizes=factor_sizes, nested=self.nested
            )
        elif self.noise == "codebook":
            if self.codebook is None or len(factor_sizes) > 1:
                raise ValueError("noise 'codebook' needs a tokenizer with one codebook")
            noised = codebook_noise(
                noise_rng,
                codes,
                levels=levels,
                codebook=jnp.asarray(self.codebook),
                nested=self.nested,
            )
        elif self.noise == "self":
            draw_rng, keep_rng = jax.random.split(noise_rng)
            drawn = jax.lax.stop_gradient(draw(draw_rng))
            replaced = jax.random.uniform(keep_rng, drawn.shape[:-1]) < levels
            noised = jnp.where(replaced[..., None], drawn, windows(codes, window))
        else:
            noised = windows(codes, window)
        seen = jnp.broadcast_to(inside(length, window), noised.shape[:-1])
        if self.drafts == "random":
            valid = jax.random.randint(valid_rng, codes.shape[:2], 1, window + 1)
            seen = seen & (jnp.arange(window) < valid[..., None])
        return dataclasses.replace(token, codes=noised[:, :-1], seen=seen[:, :-1])


class QueryBlock(nn.Module):
    """Pre-norm self-attention over a few rows, then (unless `mlp_ratio` is 0) a GELU MLP.

    The parameter counts printed in v1 fit plain blocks of 12 d^2 whatever the backbone's block is.

    Attributes:
      rows: First and last + 1 of the rows to compute; the others only serve as keys. Exact, and
        saves their work in a last block.
    """

    num_heads: int
    mlp_ratio: int
    rows: tuple[int, int]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n rows d"]) -> Float[Array, "n kept d"]:
        d = x.shape[-1]
        kept = slice(*self.rows)
        head_dim = d // self.num_heads

        def project(y: Array, count: int, name: str) -> list[Array]:
            features = (count, self.num_heads, head_dim)
            axes = ("embed", None, "heads", None)
            y = linear.Linear(features, axes, dtype=self.dtype, name=name)(y)
            return [y[..., i, :, :] for i in range(count)]

        y = norm.RMSNorm(name="attention_norm")(x)
        keys, values = project(y, 2, "key_value")
        (queries,) = project(y[:, kept], 1, "query")
        y = attention.attend(queries, keys, values)
        y = y.reshape(*y.shape[:2], d)
        out = linear.Linear((d,), ("heads", "embed"), dtype=self.dtype, name="out")
        x = x[:, kept] + out(y)
        if self.mlp_ratio:
            y = norm.RMSNorm(name="mlp_norm")(x)
            x = x + mlp.GeluMLP(d, self.mlp_ratio * d, dtype=self.dtype, name="mlp")(y)
        return x


class QueryTransformer(nn.Module):
    """`depth` query blocks; the last computes only `rows`."""

    depth: int
    num_heads: int
    mlp_ratio: int
    rows: tuple[int, int]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n rows d"]) -> Float[Array, "n kept d"]:
        for i in range(self.depth):
            rows = self.rows if i == self.depth - 1 else (0, x.shape[1])
            x = QueryBlock(self.num_heads, self.mlp_ratio, rows, self.dtype, name=f"block_{i}")(x)
        return x


class InputEncoder(nn.Module):
    """Folds the embedded codes of a window into one vector, zero at initialisation."""

    depth: int
    num_heads: int
    mlp_ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, codes: Float[Array, "*n w d"], seen: Bool[Array, "*n w"]
    ) -> Float[Array, "*n d"]:
        """In the place of codes that are not to be seen stands a learned vector."""
        *n, w, d = codes.shape
        axes = (None, "embed")
        position = parameter.parameter(
            self, "position", parameter.normal_init, (w + 1, d), axes
        ).astype(self.dtype)
        pad = parameter.parameter(self, "pad", parameter.zeros_init, (d,), axes[1:])
        entries = jnp.where(seen[..., None], codes, pad.astype(codes.dtype)).reshape(-1, w, d)
        # Row 0 is the query: nothing but its own learned vector.
        rows = jnp.pad(entries, ((0, 0), (1, 0), (0, 0))) + position
        rows = QueryTransformer(
            self.depth, self.num_heads, self.mlp_ratio, (0, 1), self.dtype, name="transformer"
        )(rows)
        return gain(self, norm.RMSNorm(use_scale=False)(rows[:, 0])).reshape(*n, d)


class OutputDecoder(nn.Module):
    """Unfolds a condition into a row per entry; row 0 is the condition itself at initialisation.

    The rows come out normalised as the condition is, so that one head serves all entries.
    """

    depth: int
    num_heads: int
    window: int
    mlp_ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, cond: Float[Array, "*n d"], num_entries: int) -> Float[Array, "*n w d"]:
        """Rows of the first entries; their values do not depend on how many they are."""
        *n, d = cond.shape
        flat = cond.reshape(-1, d)
        queries = parameter.parameter(
            self, "queries", parameter.normal_init, (self.window, d), (None, "embed")
        ).astype(cond.dtype)
        queries = jnp.broadcast_to(queries, (flat.shape[0], self.window, d))
        rows = jnp.concatenate([flat[:, None], queries], axis=1)
        rows = QueryTransformer(
            self.depth,
            self.num_heads,
            self.mlp_ratio,
            (1, 1 + num_entries),
            self.dtype,
            name="transformer",
        )(rows)
        rows = norm.RMSNorm(use_scale=False)(rows)
        first = flat + gain(self, rows[:, 0])
        rows = jnp.concatenate([first[:, None], rows[:, 1:]], axis=1)
        return rows.reshape(*n, num_entries, d)


def gain(module: nn.Module, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Scales each channel by a learned gain that starts at zero.

    A vector and not a matrix: the published parameter counts leave no room for d x d.
    """
    scale = parameter.parameter(module, "gain", parameter.zeros_init, (x.shape[-1],), ("embed",))
    return scale.astype(x.dtype) * x


class Windowed(nn.Module, kw_only=True):
    """TensorAR around a model of codes, itself a `types.CausalModel`.

    The model inside keeps its parameters under their own names; the window adds its own two parts
    beside them.

    Attributes:
      inner: Unbound model that predicts one code at a position.
      window: Codes predicted at each position; at least 2.
      depth: Query blocks on each side (2 in arXiv v1, 1 in the ICLR version).
      num_heads: Of the query blocks.
      mlp_ratio: Of the MLP in query blocks; 0 for attention only (ICLR version).
    """

    inner: Any
    window: int
    num_heads: int
    depth: int = 2
    mlp_ratio: int = 4
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        nn.share_scope(self, self.inner)
        blocks = (self.depth, self.num_heads)
        self.window_encoder = InputEncoder(*blocks, self.mlp_ratio, self.dtype)
        self.window_decoder = OutputDecoder(*blocks, self.window, self.mlp_ratio, self.dtype)

    @property
    def length(self) -> int:
        return self.inner.length

    @property
    def factor_sizes(self) -> tuple[int, ...]:
        return self.inner.factor_sizes

    @property
    def channels(self) -> int | None:
        return self.inner.channels

    @property
    def unrolled(self) -> bool:
        return self.inner.unrolled

    def no_prompt(self, num_rows: int) -> types.Prompt:
        return self.inner.no_prompt(num_rows)

    def null(self, prompt: types.Prompt) -> types.Prompt:
        return self.inner.null(prompt)

    def empty_cache(self, prompt: types.Prompt) -> types.Cache:
        return self.inner.empty_cache(prompt)

    def prefix(
        self, prompt: types.Prompt, at: Int[Array, "*b 1"]
    ) -> tuple[Float[Array, "b p d"], Int[Array, "*b p"]]:
        return self.inner.prefix(prompt, at)

    def embed(self, token: types.Token, at: Int[Array, "*b n_plus_1"]) -> Float[Array, "b n d"]:
        """The embedded token, told the drafts of what comes after it."""
        assert token.seen is not None
        codes = self.inner.code_vectors(token.codes)
        return self.inner.embed(token, at) + self.window_encoder(codes, token.seen)

    def advance(
        self,
        x: Float[Array, "b n d"],
        about: Int[Array, "*b n"],
        prompt: types.Prompt,
        cache: types.Cache | None,
    ) -> tuple[Float[Array, "b n d"], types.Cache | None]:
        return self.inner.advance(x, about, prompt, cache)

    def rows(self, cond: Float[Array, "*n d"], num_entries: int) -> Float[Array, "*n w d"]:
        """From a condition, a row for each of the first entries of its window."""
        return self.window_decoder(cond, num_entries)

    def factor_logits(
        self, row: Float[Array, "*n d"], factors: Int[Array, "*n i"]
    ) -> Float[Array, "*n v"]:
        return self.inner.factor_logits(row, factors)

    def all_factor_logits(
        self, row: Float[Array, "*n d"], factors: Int[Array, "*n factors"]
    ) -> list[Float[Array, "*n v"]]:
        return self.inner.all_factor_logits(row, factors)

    def code_vectors(self, codes: Int[Array, "*n factors"]) -> Float[Array, "*n d"]:
        return self.inner.code_vectors(codes)

    def latent_cond(
        self, cond: Float[Array, "*n d"], codes: Int[Array, "*n"] | None
    ) -> Float[Array, "*n d"]:
        """Of a model that has latents besides."""
        return self.inner.latent_cond(cond, codes)

    def denoise(
        self, x: Float[Array, "*n c"], t: Int[Array, "..."], cond: Float[Array, "*n d"]
    ) -> Float[Array, "*n two_c"]:
        """Of a model that has latents besides."""
        return self.inner.denoise(x, t, cond)
