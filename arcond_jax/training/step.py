"""One update: loss, gradient, clip, AdamW, average; a gradient that is not finite is skipped."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from arcond_jax import types
from arcond_jax.training import state as state_lib


def make_train_step(
    generator: types.Generator,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    ema_decay: float,
    num_accumulations: int = 1,
    random_flip: bool = False,
) -> Callable:
    """A pure function `(state, tokenizer, batch) -> (state, metrics)`, to be jitted.

    Args:
      rate: Learning rate by update, for the log only.
      ema_decay: Of the average of parameters, in [0, 1).
      num_accumulations: Pieces the batch is cut into, one backward pass each; divides the batch.
      random_flip: Whether half of the images are mirrored, left to right.
    """

    def gradient(params, tokens, label, rng, step):
        (_, metrics), grads = jax.value_and_grad(generator.loss, has_aux=True)(
            params, tokens, label, rng, step=step
        )
        return metrics, grads

    def accumulated_gradient(params, tokens, label, rng, step):
        if num_accumulations == 1:
            return gradient(params, tokens, label, rng, step)

        # Piece i takes every n-th row, so that each piece lies on all devices.
        def pieces(x: Array) -> Array:
            return jnp.moveaxis(x.reshape(-1, num_accumulations, *x.shape[1:]), 1, 0)

        def body(total, piece):
            i, piece_tokens, piece_label = piece
            new = gradient(params, piece_tokens, piece_label, jax.random.fold_in(rng, i), step)
            return jax.tree.map(jnp.add, total, new), None

        tokens, label = jax.tree.map(pieces, (tokens, label))
        first = jax.tree.map(lambda x: x[0], (tokens, label))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(gradient, params, *first, rng, step),
        )
        total, _ = jax.lax.scan(body, zeros, (jnp.arange(num_accumulations), tokens, label))
        return jax.tree.map(lambda x: x / num_accumulations, total)

    def train_step(
        state: state_lib.TrainState, tokenizer: types.Tokenizer, batch: types.Batch
    ) -> tuple[state_lib.TrainState, types.Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        image_rng = jax.random.fold_in(rng, jnp.iinfo(jnp.int32).max)  # far from those of pieces
        flip_rng, encode_rng = jax.random.split(image_rng)
        image = batch.image
        if random_flip:
            flipped = jax.random.bernoulli(flip_rng, 0.5, (image.shape[0], 1, 1, 1))
            image = jnp.where(flipped, image[:, :, ::-1], image)
        tokens = tokenizer.encode(image, encode_rng)
        metrics, grads = accumulated_gradient(state.params, tokens, batch.label, rng, state.step)

        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
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
        metrics = metrics | {
            "gradient_norm": norm,
            "learning_rate": rate(state.step - 1),
            "skipped_updates": state.skipped.astype(jnp.float32),
        }
        return state, metrics

    return train_step
