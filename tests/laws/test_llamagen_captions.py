"""LlamaGen with captions: what padding may change, cached and uncached runs, guidance, training."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from arcond_jax import types
from arcond_jax.models import causal, gpt, llamagen, losses
from arcond_jax.sampling import guidance, heads, raster
from arcond_jax.transport import refiners

NUM_CODES, PREFIX, WIDTH, LENGTH = 11, 5, 8, 6
LENGTHS = (1, 3, 5)  # of the captions, without their padding
BACKBONE = gpt.GPT(depth=2, width=16, num_heads=2, grid=(2, 3), num_prefix=PREFIX, mlp_hidden=32)
NETWORK = llamagen.LlamaGen(
    backbone=BACKBONE, num_classes=None, num_codes=NUM_CODES, caption_width=WIDTH
)
GENERATOR = causal.Generator(NETWORK, (losses.CodeLoss(),), label_dropout=0.0)
RNG = jax.random.key(5)
VALID = jnp.arange(PREFIX) >= PREFIX - jnp.array(LENGTHS)[:, None]
EMBEDDING = jax.random.normal(jax.random.key(1), (len(LENGTHS), PREFIX, WIDTH))
CAPTION = types.Caption(EMBEDDING, VALID, jnp.ones(len(LENGTHS), bool))
OTHER = dataclasses.replace(
    CAPTION, embedding=jax.random.normal(jax.random.key(2), EMBEDDING.shape)
)
SHORTER = dataclasses.replace(CAPTION, valid=VALID.at[:, :-1].set(False))
OTHER_PADDING = dataclasses.replace(
    CAPTION, embedding=jnp.where(VALID[..., None], EMBEDDING, jnp.nan)
)
CODES = jax.random.randint(jax.random.key(3), (len(LENGTHS), LENGTH), 0, NUM_CODES)
TOKENS = types.Tokens(codes=CODES)


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(jax.eval_shape(GENERATOR.init, RNG), 0.3)


@functools.cache
def sampler(**choices):
    loop = raster.Raster(
        NETWORK, (heads.Codes(),), guidance=guidance.Guidance(**choices), trace=True
    )

    @jax.jit
    def sample(params, caption, first_row):
        return loop(params, RNG, caption, refiner=refiners.Identity(), first_row=first_row)

    return sample


def sample(params, caption, first_row=0, **choices):
    return sampler(**choices)(params, caption, first_row)


@pytest.fixture(scope="module")
def plain(params):
    return sample(params, CAPTION)


@pytest.fixture(scope="module")
def guided(params):
    return sample(params, CAPTION, scale=3.0)


conditions = jax.jit(GENERATOR.conditions)


@functools.partial(jax.jit, static_argnames="generator")
def value_and_grad(params, caption, rng=RNG, generator=GENERATOR):
    return jax.value_and_grad(lambda params: generator.loss(params, TOKENS, caption, rng)[0])(
        params
    )


def test_the_content_of_padding_changes_no_sample(params, guided):
    drawn = sample(params, OTHER_PADDING, scale=3.0)
    np.testing.assert_array_equal(drawn.tokens.codes, guided.tokens.codes)
    np.testing.assert_array_equal(drawn.cond[0], guided.cond[0])
    drawn = sample(params, OTHER, scale=3.0)
    assert np.all(np.abs(drawn.cond[0] - guided.cond[0]).max((1, 2)) > 1e-2)


def test_the_content_of_padding_changes_nothing_in_training(params):
    loss, gradient = value_and_grad(params, CAPTION)
    jax.tree.map(
        np.testing.assert_array_equal, value_and_grad(params, OTHER_PADDING), (loss, gradient)
    )
    assert abs(value_and_grad(params, OTHER)[0] - loss) > 1e-3
    assert abs(value_and_grad(params, SHORTER)[0] - loss) > 1e-3
    assert np.abs(gradient["cap_proj"]["Linear_0"]["kernel"]).max() > 1e-4
    assert not np.any(gradient["no_caption"])  # every row has its caption


def test_rows_without_a_caption_know_its_length_alone(params):
    def unconditional(caption):
        return conditions(params, TOKENS, NETWORK.null(caption))

    given, null = conditions(params, TOKENS, CAPTION), unconditional(CAPTION)
    assert np.all(np.abs(given - null)[:, 0].max(1) > 1e-2)
    np.testing.assert_array_equal(unconditional(OTHER), null)
    # The first condition has seen no code: rows with as much padding have the same.
    shorter = unconditional(SHORTER)[:, 0]
    np.testing.assert_allclose(shorter, jnp.tile(null[:1, 0], (3, 1)), atol=1e-6)
    assert np.abs(shorter - null[:, 0])[1:].max() > 1e-2


@pytest.mark.slow
def test_conditions_step_by_step_are_those_of_one_pass(params, plain, guided):
    for drawn in (plain, guided):
        expected = conditions(params, drawn.tokens, CAPTION)
        np.testing.assert_allclose(drawn.cond[0], expected, atol=2e-5)


@pytest.mark.slow
def test_guidance_of_one_is_none(params, plain, guided):
    for choices in (
        dict(scale=3.0, positions=0),
        dict(scale=float(np.nextafter(1.0, 2.0)), schedule="linear"),
    ):
        drawn = sample(params, CAPTION, **choices)
        np.testing.assert_array_equal(drawn.tokens.codes, plain.tokens.codes)
    assert np.any(guided.tokens.codes != plain.tokens.codes)


@pytest.mark.slow
def test_a_power_of_zero_is_constant_guidance(params, guided):
    drawn = sample(params, CAPTION, scale=3.0, schedule="power_cosine", power=0.0)
    np.testing.assert_array_equal(drawn.tokens.codes, guided.tokens.codes)


@pytest.mark.slow
def test_a_caption_alone_is_drawn_as_in_a_batch(params, guided):
    for row in range(len(LENGTHS)):
        caption = jax.tree.map(lambda x, row=row: x[row : row + 1], CAPTION)
        alone = sample(params, caption, row, scale=3.0)
        np.testing.assert_array_equal(alone.tokens.codes[0], guided.tokens.codes[row])


def test_a_dropped_caption_leaves_its_length_alone(params):
    generator = dataclasses.replace(GENERATOR, label_dropout=1.0)
    loss, gradient = value_and_grad(params, CAPTION, generator=generator)
    jax.tree.map(
        np.testing.assert_array_equal,
        value_and_grad(params, OTHER, generator=generator),
        (loss, gradient),
    )
    assert np.abs(gradient["no_caption"]).max() > 1e-4
    assert abs(value_and_grad(params, SHORTER, generator=generator)[0] - loss) > 1e-3
    # As if no caption had been given in the first place.
    null = value_and_grad(params, NETWORK.null(CAPTION))[0]
    np.testing.assert_allclose(loss, null, rtol=1e-6)
    assert abs(value_and_grad(params, CAPTION)[0] - loss) > 1e-3


@pytest.mark.slow
def test_loss_falls():
    update = optax.adam(1e-2)
    generator = causal.Generator(NETWORK, (losses.CodeLoss(),))

    @jax.jit
    def train(rng):
        params = nn.unbox(generator.init(rng))

        def body(carry, rng):
            params, state = carry
            loss, gradient = value_and_grad(params, CAPTION, rng, generator)
            updates, state = update.update(gradient, state)
            return (optax.apply_updates(params, updates), state), loss

        carry = (params, update.init(params))
        return jax.lax.scan(body, carry, jax.random.split(rng, 20))[1]

    values = train(RNG)
    np.testing.assert_allclose(values[0], np.log(NUM_CODES), rtol=1e-5)  # the head is zero
    assert values[-1] < 0.5 * values[0]
