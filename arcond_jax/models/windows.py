"""Windows of codes, and what those fed in show while a model is trained: drafts and their noise.

Window i is (y_i, ..., y_{i+w-1}) in the order positions are visited; its entries beyond the first
are drafts.

Source: "TensorAR: Refinement is All You Need in Autoregressive Image Generation" (arXiv v1, May
2025, and ICLR 2026), whose versions differ: v1 has noise through the tokenizer's codebook, ICLR
categorical noise.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from arcond_jax import types

NOISES = ("categorical", "codebook", "self", "none")
SHOWN = ("masked", "noised", "random")
SCHEDULES = {
    "linear": lambda u: u,
    "sine": lambda u: np.sin(np.pi * u / 2),
    "sqrt": np.sqrt,
    "exponential": lambda u: (np.exp(u) - 1.0) / (math.e - 1.0),
}


def of(x: Array, window: int) -> Array:
    """What lies at each position of [b, l, *n] and the `window - 1` after it: [b, l, w, *n].

    Beyond the end it is 0; `inside` tells where.
    """
    padded = jnp.pad(x, ((0, 0), (0, window - 1), *[(0, 0)] * (x.ndim - 2)))
    return jnp.stack([padded[:, j : j + x.shape[1]] for j in range(window)], axis=2)


def ahead(at: Int[Array, "*b l"], window: int) -> Int[Array, "*b l w"]:
    """Positions of the entries of every window, from those in the order they are visited.

    Beyond the end the last stands again.
    """
    entry = jnp.arange(at.shape[-1])[:, None] + jnp.arange(window)
    return at[..., jnp.minimum(entry, at.shape[-1] - 1)]


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
        threshold, noise = of(threshold, window), of(noise, window)
    return jnp.where((threshold < levels)[..., None], noise, of(codes, window))


def codebook_noise(
    rng: Key[Array, ""],
    codes: Int[Array, "b l 1"],
    *,
    levels: Float[np.ndarray, " w"],
    codebook: Float[Array, "v c"],
    nested: bool = False,
) -> Int[Array, "b l w 1"]:
    """Windows whose entry j is the code nearest to a mix of its vector and a random one's (v1).

    Nearest by cosine in the tokenizer's codebook, (1 - b_j) W[x] + b_j W[n] with n uniform; never
    in the model's own embedding, whose near-orthogonal rows would make it a hard switch.

    Args:
      codebook: The tokenizer's vectors; centred if they have a common direction (raw pixels do).
      nested: As in `categorical_noise`; the paper draws for every window.

    """
    window = len(levels)
    clean = of(codes[..., 0], window)
    shape = codes.shape[:2] if nested else clean.shape
    noise = jax.random.randint(rng, shape, 0, len(codebook))
    if nested:
        noise = of(noise, window)

    noised = nearest_to_mixed(clean, noise, levels=levels, codebook=codebook)
    return jax.lax.stop_gradient(noised)[..., None]


def nearest_to_mixed(
    codes: Int[Array, "b *n w"],
    noise: Int[Array, "b *n w"],
    *,
    levels: Float[np.ndarray, " w"],
    codebook: Float[Array, "v c"],
) -> Int[Array, "b *n w"]:
    """Of entries j > 0 the code nearest to (1 - b_j) W[code] + b_j W[noise] by cosine.

    One code of each row is looked up at a time, so that scores are never more than b x v, and a
    batch that is cut over devices stays so.
    """
    rows = codebook / jnp.maximum(jnp.linalg.norm(codebook, axis=-1, keepdims=True), 1e-12)

    # Entry 0 is always clean, so only the others are looked up.
    def one_by_one(x: Array) -> Array:
        return jnp.moveaxis(x[..., 1:].reshape(x.shape[0], -1), 0, 1)

    level = jnp.broadcast_to(jnp.asarray(levels)[1:], codes[0, ..., 1:].shape).reshape(-1)

    def nearest(query: tuple) -> Int[Array, " b"]:
        x, n, b = query
        mixed = (1.0 - b) * rows[x] + b * rows[n]
        scores = jnp.matmul(mixed, rows.T, precision="highest")
        return jnp.argmax(scores, axis=-1).astype(codes.dtype)

    mixed = jax.lax.map(nearest, (one_by_one(codes), one_by_one(noise), level))
    mixed = jnp.moveaxis(mixed, 0, 1).reshape(codes[..., 1:].shape)
    return jnp.concatenate([codes[..., :1], mixed], axis=-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """Noise on the drafts of a window that was drawn, of the law they were trained with.

    Attributes:
      kind: "categorical" or "codebook".
      levels: Share of noise on each entry, as of `noise_levels`.
      nested: Whether the windows of a row share one draw of noise per token.

    Raises:
      ValueError: Noise that is no function of codes alone.
    """

    kind: str
    levels: Float[np.ndarray, " w"]
    nested: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("categorical", "codebook"):
            raise ValueError(f"noise {self.kind!r} cannot be put on drafts: use categorical")

    def __call__(
        self,
        window: Int[Array, "b w factors"],
        rngs: Key[Array, " b"],
        position: Int[Array, ""],
        *,
        factor_sizes: tuple[int, ...],
        codebook: Float[Array, "v c"] | None = None,
    ) -> Int[Array, "b w factors"]:
        """The window at a position, noised; entry 0 stays.

        Args:
          rngs: One for each row, the same at all positions.
          codebook: As in `codebook_noise`, which needs it.
        """
        sizes = np.array(factor_sizes)

        def draw(rng: Key[Array, ""], at: Array) -> tuple[Array, Array]:
            rng = jax.random.fold_in(rng, at)
            if not self.nested:
                rng = jax.random.fold_in(rng, position)
            threshold_rng, noise_rng = jax.random.split(rng)
            noise = jax.random.randint(noise_rng, sizes.shape, 0, sizes, window.dtype)
            return jax.random.uniform(threshold_rng), noise

        of_rows = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))
        threshold, noise = of_rows(rngs, position + jnp.arange(len(self.levels)))
        if self.kind == "categorical":
            return jnp.where((threshold < self.levels)[..., None], noise, window)
        if codebook is None:
            raise ValueError("noise 'codebook' needs the vectors of the codes")
        noised = nearest_to_mixed(
            window[..., 0], noise[..., 0], levels=self.levels, codebook=codebook
        )
        return noised[..., None]


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
            noised = jnp.where(replaced[..., None], drawn, of(codes, window))
        else:
            noised = of(codes, window)
        seen = jnp.broadcast_to(inside(length, window), noised.shape[:-1])
        if self.drafts == "random":
            valid = jax.random.randint(valid_rng, codes.shape[:2], 1, window + 1)
            seen = seen & (jnp.arange(window) < valid[..., None])
        return dataclasses.replace(token, codes=noised[:, :-1], seen=seen[:, :-1])
