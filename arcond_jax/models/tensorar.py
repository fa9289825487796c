"""Next-tensor prediction: windows of codes, their noise, and the two query transformers.

Window i is (y_i, ..., y_{i+w-1}); what lies beyond the end is the pad code. The input encoder
folds a window into one hidden state, the output decoder unfolds a condition into w of them; both
start as the identity of the plain autoregressive model, which window 1 always is.

Source: "TensorAR: Refinement is All You Need in Autoregressive Image Generation" (arXiv v1, May
2025, and ICLR 2026). The two versions differ: v1 has two plain transformer blocks on each side
and noise through the tokenizer's codebook, ICLR one attention layer and categorical noise.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Key

from arcond_jax.nn import attention, linear, mlp, norm, parameter

SCHEDULES = {
    "linear": lambda u: u,
    "sine": lambda u: np.sin(np.pi * u / 2),
    "sqrt": np.sqrt,
    "exponential": lambda u: (np.exp(u) - 1.0) / (math.e - 1.0),
}


def windows(codes: Int[Array, "b l"], window: int, *, pad: int) -> Int[Array, "b l w"]:
    """The codes at each position and the `window - 1` after it, `pad` beyond the end."""
    padded = jnp.pad(codes, ((0, 0), (0, window - 1)), constant_values=pad)
    length = codes.shape[1]
    return jnp.stack([padded[:, j : j + length] for j in range(window)], axis=-1)


def mask_slots(
    window_codes: Int[Array, "... w"], num_valid: Int[Array, "..."], *, pad: int
) -> Int[Array, "... w"]:
    """Keeps the first `num_valid` slots of each window and pads the rest."""
    slot = jnp.arange(window_codes.shape[-1])
    return jnp.where(slot < num_valid[..., None], window_codes, pad)


def noise_levels(schedule: str, window: int) -> Float[np.ndarray, " w"]:
    """b_j, the share of noise on slot j: 0 at slot 0, growing with j / window, never 1.

    The paper's table of formulas did not survive; these are the usual curves of those names:
    u, sin(pi u / 2), sqrt(u), (e^u - 1) / (e - 1).
    """
    return SCHEDULES[schedule](np.arange(window) / window).astype(np.float32)


def categorical_noise(
    rng: Key[Array, ""],
    codes: Int[Array, "b l"],
    *,
    levels: Float[np.ndarray, " w"],
    num_codes: int,
    nested: bool = True,
) -> Int[Array, "b l w"]:
    """Windows whose slot j is replaced by a uniform code with probability b_j (ICLR version).

    Args:
      nested: One noise code and one threshold per token, shared by all windows that hold it, so
        the windows reveal no more together than the cleanest of them; otherwise every window draws
        afresh, and a model that sees several can vote the noise away.
    """
    window = len(levels)
    shape = codes.shape if nested else (*codes.shape, window)
    threshold_rng, noise_rng = jax.random.split(rng)
    threshold = jax.random.uniform(threshold_rng, shape)
    noise = jax.random.randint(noise_rng, shape, 0, num_codes)
    clean = windows(codes, window, pad=num_codes)
    if nested:
        noise = windows(noise, window, pad=num_codes)
        threshold = jnp.pad(threshold, ((0, 0), (0, window - 1)), constant_values=1.0)
        threshold = jnp.stack([threshold[:, j : j + codes.shape[1]] for j in range(window)], -1)
    return jnp.where((threshold < levels) & (clean != num_codes), noise, clean)


def codebook_noise(
    rng: Key[Array, ""],
    codes: Int[Array, "b l"],
    *,
    levels: Float[np.ndarray, " w"],
    codebook: Float[Array, "v c"],
    nested: bool = False,
    block_size: int = 2048,
) -> Int[Array, "b l w"]:
    """Windows whose slot j is the code nearest to a mix of its vector and a random one's (v1).

    Nearest by cosine in the tokenizer's codebook, (1 - b_j) W[x] + b_j W[n] with n uniform; never
    in the model's own embedding, whose near-orthogonal rows would make it a hard switch.

    Args:
      codebook: The tokenizer's vectors; centred if they have a common direction (raw pixels do).
      nested: As in `categorical_noise`; the paper draws for every window.
      block_size: Tokens looked up at a time: the score matrix is never larger than that times v.
    """
    num_codes, window = codebook.shape[0], len(levels)
    rows = codebook / jnp.maximum(jnp.linalg.norm(codebook, axis=-1, keepdims=True), 1e-12)
    clean = windows(codes, window, pad=num_codes)
    shape = codes.shape if nested else clean.shape
    noise = jax.random.randint(rng, shape, 0, num_codes)
    if nested:
        noise = windows(noise, window, pad=num_codes)

    # Slot 0 is always clean, so only the others are looked up.
    old, new = (jnp.minimum(x[..., 1:].reshape(-1), num_codes - 1) for x in (clean, noise))
    level = jnp.broadcast_to(jnp.asarray(levels)[1:], clean[..., 1:].shape).reshape(-1, 1)

    def nearest(query: tuple) -> Int[Array, ""]:
        x, n, b = query
        mixed = (1.0 - b) * rows[x] + b * rows[n]
        return jnp.argmax(jnp.matmul(rows, mixed, precision="highest"))

    mixed = jax.lax.map(nearest, (old, new, level), batch_size=block_size)
    noised = jnp.concatenate([clean[..., :1], mixed.reshape(clean[..., 1:].shape)], axis=-1)
    return jax.lax.stop_gradient(jnp.where(clean == num_codes, clean, noised))


def slot_mask(length: int, window: int) -> Bool[np.ndarray, "l w"]:
    """True where slot j of window i lies within the sequence."""
    return np.arange(length)[:, None] + np.arange(window) < length


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
    def __call__(self, slots: Float[Array, "*n w d"]) -> Float[Array, "*n d"]:
        *n, w, d = slots.shape
        slots = slots.reshape(-1, w, d)
        position = parameter.parameter(
            self, "position", parameter.normal_init, (w + 1, d), (None, "embed")
        ).astype(self.dtype)
        # Row 0 is the query: nothing but its own learned vector.
        rows = jnp.pad(slots, ((0, 0), (1, 0), (0, 0))) + position
        rows = QueryTransformer(
            self.depth, self.num_heads, self.mlp_ratio, (0, 1), self.dtype, name="transformer"
        )(rows)
        return gain(self, norm.RMSNorm(use_scale=False)(rows[:, 0])).reshape(*n, d)


class OutputDecoder(nn.Module):
    """Unfolds a condition into one row per slot; row 0 is the condition itself at initialisation.

    The rows come out normalised as the condition is, so that one head serves all slots.
    """

    depth: int
    num_heads: int
    window: int
    mlp_ratio: int = 4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, cond: Float[Array, "*n d"], num_slots: int | None = None
    ) -> Float[Array, "*n w d"]:
        """`num_slots` computes only the first slots; their values do not depend on it."""
        *n, d = cond.shape
        flat = cond.reshape(-1, d)
        queries = parameter.parameter(
            self, "queries", parameter.normal_init, (self.window, d), (None, "embed")
        ).astype(cond.dtype)
        queries = jnp.broadcast_to(queries, (flat.shape[0], self.window, d))
        rows = jnp.concatenate([flat[:, None], queries], axis=1)
        num_slots = num_slots or self.window
        rows = QueryTransformer(
            self.depth,
            self.num_heads,
            self.mlp_ratio,
            (1, 1 + num_slots),
            self.dtype,
            name="transformer",
        )(rows)
        rows = norm.RMSNorm(use_scale=False)(rows)
        first = flat + gain(self, rows[:, 0])
        rows = jnp.concatenate([first[:, None], rows[:, 1:]], axis=1)
        return rows.reshape(*n, num_slots, d)


def gain(module: nn.Module, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Scales each channel by a learned gain that starts at zero.

    A vector and not a matrix: the published parameter counts leave no room for d x d.
    """
    scale = parameter.parameter(module, "gain", parameter.zeros_init, (x.shape[-1],), ("embed",))
    return scale.astype(x.dtype) * x
