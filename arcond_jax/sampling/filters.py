"""What is cut from a categorical distribution before it is drawn from, and the draw."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt


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


def categorical(rng: Key[Array, ""], logits: Float[Array, "*n v"]) -> Int[Array, "*n"]:
    """Draws `jax.random.categorical`'s codes in a quarter of its time on a CPU.

    The largest is found first, then where it is: XLA runs both through vector units, an argmax,
    which carries the value and its place along, element by element. Of logits that are not numbers
    v is drawn, which is no code.
    """
    scores = logits + jax.random.gumbel(rng, logits.shape, logits.dtype)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    v = logits.shape[-1]
    return jnp.min(jnp.where(scores == largest, jnp.arange(v, dtype=jnp.int32), v), axis=-1)
