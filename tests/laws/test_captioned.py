"""Models of captions: what padding may change, cached and uncached runs, guidance, batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from arcond_jax.models import captioned, gpt
from arcond_jax.sampling import codes as codes_lib
from arcond_jax.transport import refiners

NUM_CODES, PREFIX, WIDTH, LENGTH = 11, 5, 8, 6
LENGTHS = (1, 3, 5)  # of the captions, without their padding
BACKBONE = gpt.GPT(depth=2, width=16, num_heads=2, grid=(2, 3), num_prefix=PREFIX, mlp_hidden=32)
NETWORK = captioned.Captioned(BACKBONE, len(LENGTHS), NUM_CODES, WIDTH)
RNG, LABEL = jax.random.key(5), jnp.arange(len(LENGTHS))
VALID = jnp.arange(PREFIX) >= PREFIX - jnp.array(LENGTHS)[:, None]
EMBEDDING = jax.random.normal(jax.random.key(1), (len(LENGTHS), PREFIX, WIDTH))
OTHER = jax.random.normal(jax.random.key(2), EMBEDDING.shape)


@pytest.fixture(scope="module")
def params():
    init = functools.partial(NETWORK.init, method=captioned.Captioned.touch_all)
    return tiny.random_params(jax.eval_shape(init, RNG)["params"], 0.3)


@functools.partial(jax.jit, static_argnames=("guidance_scale", "guided_positions"))
def sample(
    params, embedding, label, first_row=0, valid=VALID, guidance_scale=1.0, guided_positions=None
):
    told = captioned.with_captions(params, embedding, valid)
    draws = (codes_lib.Draw(guidance_scale=guidance_scale),)
    loop = codes_lib.CodeSampler(NETWORK, draws, guided_positions=guided_positions, trace=True)
    return loop(told, RNG, label, refiner=refiners.Identity(), first_row=first_row)


@pytest.fixture(scope="module")
def guided(params):
    return sample(params, EMBEDDING, LABEL, guidance_scale=3.0)


def test_the_content_of_padding_changes_nothing(params, guided):
    padding = jnp.where(VALID[..., None], EMBEDDING, jnp.nan)
    drawn = sample(params, padding, LABEL, guidance_scale=3.0)
    np.testing.assert_array_equal(drawn.tokens.codes, guided.tokens.codes)
    np.testing.assert_array_equal(drawn.cond[0], guided.cond[0])
    drawn = sample(params, jnp.where(VALID[..., None], OTHER, EMBEDDING), LABEL, guidance_scale=3.0)
    assert np.all(np.abs(drawn.cond[0] - guided.cond[0]).max((1, 2)) > 1e-2)


@jax.jit
def starts(params, embedding, valid):
    """Conditions of the first position, with each caption and without."""
    told = captioned.with_captions(params, embedding, valid)
    both = jnp.concatenate([LABEL, NETWORK.null(LABEL)])
    return jnp.split(NETWORK.apply({"params": told}, both, method="start")[0], 2)


def test_rows_without_a_caption_know_its_length_alone(params):
    conditional, unconditional = starts(params, EMBEDDING, VALID)
    assert np.all(np.abs(conditional - unconditional).max(1) > 1e-2)
    other = starts(params, OTHER, VALID)
    np.testing.assert_array_equal(other[1], unconditional)
    shorter = starts(params, EMBEDDING, VALID.at[:, :-1].set(False))[1]
    np.testing.assert_allclose(shorter, jnp.tile(unconditional[:1], (3, 1)), atol=1e-6)
    assert np.abs(shorter - unconditional)[1:].max() > 1e-2


@jax.jit
def conditions(params, codes):
    """All at once, behind captions: from a cache that is empty at first."""

    def run(network):
        x, visible = network.prefix(LABEL)
        x = jnp.concatenate([x, network.code_embed(codes[:, :-1])], axis=1)
        cache = dataclasses.replace(BACKBONE.empty_cache(len(LABEL)), visible=visible)
        return network.run(x, cache)[0][:, PREFIX - 1 :]

    told = captioned.with_captions(params, EMBEDDING, VALID)
    return NETWORK.apply({"params": told}, method=run)


def test_conditions_step_by_step_are_those_of_one_pass(params, guided):
    expected = conditions(params, guided.tokens.codes)
    np.testing.assert_allclose(guided.cond[0], expected, atol=2e-5)


def test_guidance_of_one_is_none(params, guided):
    plain = sample(params, EMBEDDING, LABEL).tokens.codes
    never = sample(params, EMBEDDING, LABEL, guidance_scale=3.0, guided_positions=0)
    np.testing.assert_array_equal(never.tokens.codes, plain)
    assert np.any(guided.tokens.codes != plain)


def test_a_caption_alone_is_drawn_as_in_a_batch(params, guided):
    for row in range(len(LENGTHS)):
        alone = sample(params, EMBEDDING, LABEL[row : row + 1], row, guidance_scale=3.0)
        np.testing.assert_array_equal(alone.tokens.codes[0], guided.tokens.codes[row])
