"""What windows are worth, measured while a model is trained; nothing here has a gradient.

A cross-entropy of the next code that noised drafts lower by much shows what they leak, not how good
the model is. What a draft is worth to speculative sampling is how often it would be accepted on
its own (Leviathan et al., 2023): the overlap of its law with that of the code itself.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from arcond_jax import types
from arcond_jax.models import losses, windows


def next_cross_entropy(
    model: losses.Bound,
    cond: Float[Array, "b l d"],
    at: Int[Array, "*b l"],
    factors: Int[Array, "b l factors"],
) -> Float[Array, ""]:
    """Cross-entropy of entry 0 in nats, over all factors."""
    rows_of, entries = losses.plain_rows, range(1)
    return jnp.sum(losses.cross_entropy(model, rows_of, cond, at, factors, entries=entries))


def unchanged(token: types.Token, factors: Int[Array, "b l factors"]) -> Float[Array, " w"]:
    """Of each entry, the share of those shown that hold the real code."""
    assert token.codes is not None and token.seen is not None
    clean = windows.of(factors, token.seen.shape[-1])[:, :-1]
    same = jnp.all(token.codes == clean, axis=-1) & token.seen
    return jnp.sum(same, axis=(0, 1)) / jnp.maximum(jnp.sum(token.seen, axis=(0, 1)), 1)


def acceptance(
    model: losses.Bound,
    cond: Float[Array, "b l d"],
    at: Int[Array, "*b l"],
    factors: Int[Array, "b l factors"],
) -> Float[Array, " drafts"]:
    """Mean overlap of each draft's law with that of entry 0 where it lies; first factors alone.

    Laws are of one draft after the other: those of all are never held at once.
    """
    (num_rows, length, _), window = factors.shape, model.network.num_drafts + 1
    entries = windows.ahead(at, window)
    first = model(cond, entries[..., :1], method="rows")[..., 0, :]
    drafts = model(cond, factors, entries, method="draft_rows")

    def law(row: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        return jax.nn.softmax(model(row, factors[..., :0], method="factor_logits"))

    real = law(first)

    def of_draft(draft: tuple) -> Float[Array, ""]:
        j, row, counted = draft
        overlap = jnp.sum(jnp.minimum(jnp.roll(real, -j, axis=1), law(row)), axis=-1)
        return jnp.sum(overlap * counted) / (jnp.sum(counted) * num_rows)

    counted = jnp.asarray(windows.inside(length, window), jnp.float32).T
    return jax.lax.map(of_draft, (jnp.arange(1, window), jnp.moveaxis(drafts, 2, 0), counted[1:]))
