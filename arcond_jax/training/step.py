"""One update: loss, gradient, clip, AdamW, average; a gradient that is not finite is skipped.

What is random in it follows from the run's key and the number of the update.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

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
    rng, batch_rng = rngs_of(state, state.step)
    tokens = tokens_of(tokenizer, batch, batch_rng)
    metrics, grads = gradient(
        generator,
        state.params,
        tokens,
        batch.prompt,
        rng,
        step=state.step,
        num_accumulations=num_accumulations,
    )
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


def rngs_of(
    state: state_lib.TrainState, step: Int[Array, ""]
) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """Of an update: what its loss draws from, and what its tokens do."""
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), step)
    return rng, jax.random.fold_in(rng, jnp.iinfo(jnp.int32).max)  # far from those of pieces


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
    rng, batch_rng = rngs_of(state, step)
    tokens = tokens_of(tokenizer, batch, batch_rng)
    if num_accumulations > 1:
        rng = jax.random.fold_in(rng, 0)
    tokens, prompt = jax.tree.map(lambda x: x[::num_accumulations], (tokens, batch.prompt))
    return metrics(state.params, tokens, prompt, rng, step=step)


def gradient(
    generator: types.Generator,
    params: types.Params,
    tokens: types.Tokens,
    prompt: types.Prompt,
    rng: Key[Array, ""],
    *,
    step: Int[Array, ""],
    num_accumulations: int,
) -> tuple[types.Metrics, types.Params]:
    """Metrics and gradient of a batch, taken piece by piece."""

    def of_piece(tokens, prompt, rng):
        (_, metrics), grads = jax.value_and_grad(generator.loss, has_aux=True)(
            params, tokens, prompt, rng, step=step
        )
        return metrics, grads

    if num_accumulations == 1:
        return of_piece(tokens, prompt, rng)

    # Piece i takes every n-th row, so that each piece lies on all devices.
    def pieces(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(-1, num_accumulations, *x.shape[1:]), 1, 0)

    def body(total, piece):
        i, tokens, prompt = piece
        new = of_piece(tokens, prompt, jax.random.fold_in(rng, i))
        return jax.tree.map(jnp.add, total, new), None

    tokens, prompt = jax.tree.map(pieces, (tokens, prompt))
    first = jax.tree.map(lambda x: x[0], (tokens, prompt))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_piece, *first, rng)
    )
    total, _ = jax.lax.scan(body, zeros, (jnp.arange(num_accumulations), tokens, prompt))
    return jax.tree.map(lambda x: x / num_accumulations, total)
