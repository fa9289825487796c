"""Guidance, and what is cut from a categorical law before it is drawn from."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

SCHEDULES = ("constant", "linear")


def guidance_weight(
    scale: float, schedule: str, share: Float[Array, ""] | float
) -> Float[Array, ""]:
    """Guidance at one step: constant, or growing from 1 with the share of tokens decoded.

    Args:
      share: Of the tokens, those decoded once this step is done.

    Source: MAR, models/mar.py, `sample_tokens`: 1 + (scale - 1) * share.
    """
    if schedule == "linear":
        return jnp.asarray(1.0 + (scale - 1.0) * share, jnp.float32)
    return jnp.asarray(scale, jnp.float32)


def power_cosine_weight(
    scale: float, power: float, share: Float[Array, ""] | float
) -> Float[Array, ""]:
    """Guidance at one step: from 1 to `scale` along half a cosine of share ** power.

    Args:
      power: 0.0 is constant guidance; the larger, the longer it stays near 1.
      share: Of the tokens, those decoded before this step.

    Source: RAR (Yu et al., 2024), modeling/rar.py, `generate`; MDT (Gao et al., 2023) before it.
    """
    rise = (1.0 - jnp.cos(jnp.pi * jnp.asarray(share, jnp.float32) ** power)) / 2
    return 1.0 + (scale - 1.0) * rise


def guide(both: Float[Array, "two_b *n"], weight: Float[Array, ""] | None) -> Float[Array, "b *n"]:
    """unconditional + weight * (conditional - unconditional); conditional rows come first.

    Without a weight all rows are conditional and pass through.

    Source: Ho and Salimans (2022).
    """
    if weight is None:
        return both
    conditional, unconditional = jnp.split(both, 2)
    return unconditional + weight * (conditional - unconditional)


def guide_noise(
    output: Float[Array, "two_b *n two_c"], weight: Float[Array, ""] | None
) -> Float[Array, "b *n two_c"]:
    """Guides the noise half of a denoiser's output; the variance stays the conditional one.

    Source: MAR, models/diffloss.py, `forward_with_cfg`.
    """
    if weight is None:
        return output
    predicted, v = jnp.split(output, 2, axis=-1)
    return jnp.concatenate([guide(predicted, weight), jnp.split(v, 2)[0]], axis=-1)


def kth_largest(logits: Float[Array, "*n v"], k: int) -> Float[Array, "*n 1"]:
    """The k-th largest of each row, equal ones counted apart: exact, and cheaper than a sort.

    The bits of a float32, those of a negative one inverted and else the sign bit set, order as its
    value does. The answer is the largest number that at least k of the row reach, and 32 counts
    give it bit by bit, from the highest down.
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits < sign, bits | sign, ~bits)

    def settle(i: Int[Array, ""], answer: UInt[Array, "*n 1"]) -> UInt[Array, "*n 1"]:
        trial = answer | (sign >> i.astype(jnp.uint32))
        reached = jnp.sum(order >= trial, axis=-1, keepdims=True)
        return jnp.where(reached >= k, trial, answer)

    answer = jnp.zeros((*logits.shape[:-1], 1), jnp.uint32)
    answer = jax.lax.fori_loop(0, 32, settle, answer)
    bits = jnp.where(answer < sign, ~answer, answer ^ sign)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(logits.dtype)


def filter_logits(
    logits: Float[Array, "*n v"],
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Float[Array, "*n v"]:
    """Sets to -inf what is unlikely: by rank, then by mass, then against the most likely code.

    What stays is the `top_k` largest, of these the most likely up to probability mass `top_p`, and
    of these the ones whose probability is at least `min_p` times the largest. None cuts nothing.
    Ties with the k-th largest stay. The first code that crosses `top_p` stays.

    Source: LlamaGen, autoregressive/models/generate.py, `top_k_top_p_filtering`; for `min_p`,
    Nguyen et al. (2024), "Turning Up the Heat".
    """
    if top_k is not None and top_k < logits.shape[-1]:
        logits = jnp.where(logits < kth_largest(logits, top_k), -jnp.inf, logits)
    if top_p is not None and top_p < 1.0:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(ranked, axis=-1) - ranked
        removed = jnp.take_along_axis(before > top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(removed, -jnp.inf, logits)
    if min_p is not None and min_p > 0.0:
        threshold = jnp.max(logits, axis=-1, keepdims=True) + math.log(min_p)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits
