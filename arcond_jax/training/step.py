"""One update: loss, gradient, clip, AdamW, average; a gradient that is not finite is skipped.

What is random in it follows from the run's key and the number of the update.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from arcond_jax import types
from arcond_jax.training import state as state_lib

TokensOf = Callable[[types.Tokenizer, types.Batch, Key[Array, ""]], types.Tokens]


def train_step(
    state: state_lib.TrainState,
    tokenizer: types.Tokenizer,
    batch: types.Batch,
    *,
    generator: types.Generator,
    tokens_of: TokensOf,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    ema_decay: float,
    num_accumulations: int = 1,
) -> tuple[state_lib.TrainState, types.Metrics]:
    """The state after one update, and what to log of it; a pure function, to be jitted.

    Args:
      tokens_of: Makes the tokens of a batch.
      rate: Learning rate by update, for the log only.
      ema_decay: Of the average of parameters, in [0, 1).
      num_accumulations: Pieces the batch is cut into, one backward pass each; divides the batch.
    """

    def loss(
        params: types.Params, batch: types.Batch, rng: Key[Array, ""]
    ) -> tuple[Float[Array, ""], types.Metrics]:
        tokens = tokens_of(tokenizer, batch, rng_of_tokens(rng))
        return generator.loss(params, tokens, batch.prompt, rng, step=state.step)

    rng = rng_of(state, state.step)
    metrics, grads = gradient(loss, state.params, batch, rng, num_accumulations=num_accumulations)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
    # The average of what never changes is that, to the last bit.
    ema = jax.tree.map(lambda new, old, x: jnp.where(x == old, old, new), ema, state.ema, params)
    finite = jnp.isfinite(norm)
    params, ema, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, ema, opt_state),
        (state.params, state.ema, state.opt_state),
    )
    bad = jnp.where(finite, 0, 1)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        ema=ema,
        opt_state=opt_state,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
        skipped=state.skipped + bad,
    )
    return state, metrics | {
        "gradient_norm": norm,
        "learning_rate": rate(state.step - 1),
        "skipped_updates": state.skipped.astype(jnp.float32),
    }


def rng_of(state: state_lib.TrainState, step: Int[Array, ""]) -> Key[Array, ""]:
    """What an update draws from; a piece of its batch folds its number in."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.rng), step)


def rng_of_tokens(rng: Key[Array, ""]) -> Key[Array, ""]:
    """What the tokens of a batch or piece are drawn from, where its loss draws from `rng`."""
    return jax.random.fold_in(rng, jnp.iinfo(jnp.int32).max)  # far from the numbers of pieces


def measures(
    state: state_lib.TrainState,
    tokenizer: types.Tokenizer,
    batch: types.Batch,
    *,
    metrics: Callable[..., types.Metrics],
    tokens_of: TokensOf,
    num_accumulations: int = 1,
) -> types.Metrics:
    """What else is logged, of the batch of the last update and with what it drew; to be jitted.

    Args:
      metrics: Takes what a loss takes.
      num_accumulations: As in `train_step`; of its pieces, the first is measured.
    """
    step = state.step - 1
    rng = rng_of(state, step)
    if num_accumulations > 1:
        rng = jax.random.fold_in(rng, 0)
    batch = jax.tree.map(lambda x: x[::num_accumulations], batch)
    tokens = tokens_of(tokenizer, batch, rng_of_tokens(rng))
    return metrics(state.params, tokens, batch.prompt, rng, step=step)


def gradient(
    loss: Callable[
        [types.Params, types.Batch, Key[Array, ""]], tuple[Float[Array, ""], types.Metrics]
    ],
    params: types.Params,
    batch: types.Batch,
    rng: Key[Array, ""],
    *,
    num_accumulations: int,
) -> tuple[types.Metrics, types.Params]:
    """Metrics and gradient of a batch, taken piece by piece."""

    def of_piece(batch: types.Batch, rng: Key[Array, ""]) -> tuple[types.Metrics, types.Params]:
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, rng)
        return metrics, grads

    if num_accumulations == 1:
        return of_piece(batch, rng)

    # Piece i takes every n-th row, so that each piece lies on all devices.
    def pieces(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(-1, num_accumulations, *x.shape[1:]), 1, 0)

    def body(total: Any, piece: tuple[Int[Array, ""], types.Batch]) -> tuple[Any, None]:
        i, batch = piece
        new = of_piece(batch, jax.random.fold_in(rng, i))
        return jax.tree.map(jnp.add, total, new), None

    batches = jax.tree.map(pieces, batch)
    first = jax.tree.map(lambda x: x[0], batches)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_piece, first, rng)
    )
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(num_accumulations), batches))
    return jax.tree.map(lambda x: x / num_accumulations, total)
