"""Guidance, and what is cut from a categorical law before it is drawn from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SCHEDULES = ("constant", "linear")


def guidance_weight(
    scale: float, schedule: str, position: Int[Array, ""], length: int
) -> Float[Array, ""]:
    """Guidance at a position: constant, or growing from 1 with the share of tokens decoded.

    Source: MAR, models/mar.py, `sample_tokens`: 1 + (scale - 1) * share.
    """
    if schedule == "linear":
        return 1.0 + (scale - 1.0) * (position + 1) / length
    return jnp.asarray(scale, jnp.float32)


def guide(both: Float[Array, "two_b *n"], weight: Float[Array, ""] | None) -> Float[Array, "b *n"]:
    """unconditional + weight * (conditional - unconditional); conditional rows come first.

    Without a weight all rows are conditional and pass through.

    Source: Ho and Salimans (2022).
    """
    if weight is None:
        return both
    conditional, unconditional = jnp.split(both, 2)
    return unconditional + weight * (conditional - unconditional)


def filter_logits(
    logits: Float[Array, "*n v"], *, top_k: int | None = None, top_p: float | None = None
) -> Float[Array, "*n v"]:
    """Sets all but the `top_k` largest, then all beyond probability mass `top_p`, to -inf.

    Ties with the k-th largest stay. The first code that crosses `top_p` stays.

    Source: LlamaGen, autoregressive/models/generate.py, `top_k_top_p_filtering`.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if top_p is not None and top_p < 1.0:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(ranked, axis=-1) - ranked
        removed = jnp.take_along_axis(before > top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(removed, -jnp.inf, logits)
    return logits
