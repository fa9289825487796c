"""Open-MAGVIT2: what a factor may know, factors of a code, cached runs, sampling, loss."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from arcond_jax import types
from arcond_jax.models import gpt, magvit2
from arcond_jax.sampling import codes as codes_lib
from arcond_jax.tokenizers import lfq
from arcond_jax.transport import refiners

pytestmark = pytest.mark.slow  # minutes of compilation; tests/parity holds the arithmetic

SIZES, NUM_CLASSES, LENGTH, BATCH = (4, 8), 3, 6, 5
BACKBONE = gpt.GPT(depth=2, width=16, num_heads=2, grid=(2, 3), mlp_hidden=32)
NETWORK = magvit2.MAGVIT2(
    BACKBONE, NUM_CLASSES, factor_sizes=SIZES, intra_depth=1, token_dropout=0.0
)
GENERATOR = magvit2.Generator(NETWORK, label_dropout=0.0)
RNG, LABEL = jax.random.key(5), jnp.array([0, 1, 2, 0, 1])
CODES = jax.random.randint(jax.random.key(2), (BATCH, LENGTH), 0, math.prod(SIZES))
IDENTITY = refiners.Identity()


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(jax.eval_shape(GENERATOR.init, RNG), 0.3)


@jax.jit
def logits(params, factors, label):
    return GENERATOR.logits(params, factors, label)


def test_factors_are_those_of_the_tokenizer():
    network = magvit2.MAGVIT2(BACKBONE, NUM_CLASSES)
    codes = jax.random.randint(RNG, (3, 50), 0, network.num_codes)
    assert network.num_codes == 2**18
    np.testing.assert_array_equal(network.split(codes), lfq.factorize(codes))
    np.testing.assert_array_equal(network.join(network.split(codes)), codes)


def test_a_factor_knows_earlier_positions_and_earlier_factors_by_gradient(params):
    # Position i has rows of its own in both tables, whose gradient is that of its factors.
    network = NETWORK.clone(factor_sizes=(LENGTH, LENGTH))
    factors = jnp.broadcast_to(jnp.arange(LENGTH)[:, None], (1, LENGTH, 2))
    rng = np.random.default_rng(1)
    tables = jnp.asarray(rng.normal(size=(2, LENGTH, BACKBONE.width)), jnp.float32)
    directions = jnp.asarray(rng.normal(size=(2, LENGTH)), jnp.float32)
    heads = jnp.asarray(rng.normal(size=(BACKBONE.width, LENGTH)), jnp.float32)

    @jax.jit
    @jax.jacrev
    def gradient(tables):
        changed = params | {f"factor_embed_{i}": {"table": tables[i]} for i in range(2)}
        changed |= {f"factor_head_{i}": {"kernel": heads} for i in range(2)}
        both = magvit2.Generator(network).logits(changed, factors, LABEL[:1])
        return jnp.stack([x[0] @ directions[i] for i, x in enumerate(both)])

    size = np.abs(gradient(tables)).max(-1)  # factor, position; factor, position
    later, same, past = (
        np.triu_indices(LENGTH, 1),
        np.diag_indices(LENGTH),
        np.tril_indices(LENGTH, -1),
    )
    for to in range(2):
        for of in range(2):
            between = size[to, :, of]
            assert np.all(between[later] == 0.0) and np.all(between[past] > 1e-5)
            # Of its own code only the second factor knows the first.
            assert np.all(between[same] > 1e-4 if (to, of) == (1, 0) else between[same] == 0.0)


@functools.cache
def sampler(draws, **choices):
    loop = codes_lib.CodeSampler(NETWORK, draws, **choices)

    @jax.jit
    def sample(params, rng, label, first_row):
        return loop(params, rng, label, refiner=IDENTITY, first_row=first_row)

    return sample


def drawn(params, *draws, label=LABEL, first_row=0, **choices):
    draws = tuple(codes_lib.Draw(**draw) for draw in draws)
    return sampler(draws, **choices)(params, RNG, label, first_row).tokens.codes


@pytest.fixture(scope="module")
def traced(params):
    return sampler((codes_lib.Draw(), codes_lib.Draw()), trace=True)(params, RNG, LABEL, 0)


@pytest.fixture(scope="module")
def plain(traced):
    return traced.tokens.codes


def test_conditions_from_the_cache_are_those_of_teacher_forcing(params, traced):
    before, after = traced.cond
    np.testing.assert_array_equal(before, after)  # nothing refines them
    expected = jax.jit(GENERATOR.conditions)(params, traced.tokens, LABEL)
    np.testing.assert_allclose(before, expected, atol=2e-5)


def test_sampled_factors_follow_the_laws_of_teacher_forcing(params, plain):
    assert plain.shape == (BATCH, LENGTH) and len(np.unique(plain)) > 8
    factors = NETWORK.split(plain)
    laws = logits(params, factors, LABEL)
    rows = jax.vmap(jax.random.fold_in, (None, 0))(RNG, jnp.arange(BATCH))
    for position in range(LENGTH):
        rngs = jax.vmap(jax.random.fold_in, (0, None))(rows, position)
        for i, law in enumerate(laws):
            of_factor = jax.vmap(jax.random.fold_in, (0, None))(rngs, i)
            expected = jax.vmap(jax.random.categorical)(of_factor, law[:, position])
            np.testing.assert_array_equal(factors[:, position, i], expected)


def test_each_factor_has_its_own_guidance(params):
    scales = (3.0, 1.5)
    codes = drawn(params, *(dict(guidance_scale=scale, top_k=1) for scale in scales))
    factors = NETWORK.split(codes)
    conditional = logits(params, factors, LABEL)
    unconditional = logits(params, factors, jnp.full_like(LABEL, NUM_CLASSES))
    for i, scale in enumerate(scales):
        guided = unconditional[i] + scale * (conditional[i] - unconditional[i])
        np.testing.assert_array_equal(factors[..., i], jnp.argmax(guided, axis=-1))
        assert np.any(factors[..., i] != jnp.argmax(conditional[i], axis=-1))


@pytest.mark.parametrize(
    ("draws", "choices"),
    [
        ((dict(top_k=SIZES[0], top_p=1.0), dict(top_k=SIZES[1], min_p=0.0)), {}),
        ((dict(guidance_scale=3.0), dict(guidance_scale=1.0)), dict(guided_positions=0)),
    ],
)
def test_what_changes_nothing_changes_nothing(params, plain, draws, choices):
    np.testing.assert_array_equal(drawn(params, *draws, **choices), plain)


def test_a_row_does_not_depend_on_its_batch(params, plain):
    for start in (0, 3):
        rows = slice(start, start + 2)
        alone = drawn(params, {}, {}, label=LABEL[rows], first_row=start, trace=True)
        np.testing.assert_array_equal(alone, plain[rows])


@functools.partial(jax.jit, static_argnames="label_dropout")
def loss(params, label, label_dropout=0.0):
    generator = magvit2.Generator(NETWORK, label_dropout=label_dropout)
    return generator.loss(params, types.Tokens(codes=CODES), label, RNG)


def test_loss_is_the_sum_of_the_naive_ones(params):
    total, metrics = loss(params, LABEL)
    factors, naive = NETWORK.split(CODES), []
    for i, law in enumerate(logits(params, factors, LABEL)):
        log_p = np.asarray(jax.nn.log_softmax(law))
        picked = [log_p[b, j, factors[b, j, i]] for b in range(BATCH) for j in range(LENGTH)]
        naive.append(-np.mean(picked))
        np.testing.assert_allclose(metrics[f"cross_entropy/factor_{i}"], naive[-1], rtol=1e-5)
    np.testing.assert_allclose(total, sum(naive), rtol=1e-5)


def test_a_dropped_label_is_the_null_class(params):
    dropped = loss(params, LABEL, label_dropout=1.0)[0]
    null = loss(params, jnp.full_like(LABEL, NUM_CLASSES))[0]
    np.testing.assert_allclose(dropped, null, rtol=1e-6)
    assert abs(null - loss(params, LABEL)[0]) > 1e-4


def test_loss_needs_codes(params):
    with pytest.raises(ValueError, match="Open-MAGVIT2 models codes"):
        GENERATOR.loss(params, types.Tokens(latents=jnp.zeros((5, 6, 2))), LABEL, RNG)


def test_dropout_reaches_the_blocks_over_factors(params):
    network = NETWORK.clone(backbone=BACKBONE.clone(dropout=0.5))
    cond = jax.random.normal(RNG, (BATCH, BACKBONE.width))
    factors = NETWORK.split(CODES[:, 0])

    @jax.jit
    def laws(rngs):
        return network.apply(
            {"params": params},
            cond,
            factors,
            method=magvit2.MAGVIT2.all_factor_logits,
            rngs=rngs,
        )

    one, other = (laws({"dropout": jax.random.key(i)}) for i in (0, 1))
    for a, b in zip(one, other, strict=True):
        assert np.all(np.abs(a - b).max(-1) > 1e-3)


def test_loss_falls_with_dropout():
    generator = magvit2.Generator(
        NETWORK.clone(token_dropout=0.1, backbone=BACKBONE.clone(dropout=0.1))
    )
    tokens = types.Tokens(codes=jnp.broadcast_to(5 * jnp.arange(LENGTH), (BATCH, LENGTH)))
    update = optax.adam(1e-2)

    @jax.jit
    def step(params, state, rng):
        gradient = jax.grad(generator.loss, has_aux=True)
        grads, metrics = gradient(params, tokens, LABEL, rng)
        updates, state = update.update(grads, state)
        return optax.apply_updates(params, updates), state, metrics["loss"]

    params = nn.unbox(jax.jit(generator.init)(jax.random.key(0)))
    state, losses = update.init(params), []
    for i in range(20):
        params, state, value = step(params, state, jax.random.key(i))
        losses.append(float(value))
    np.testing.assert_allclose(losses[0], np.log(math.prod(SIZES)), rtol=1e-5)  # heads are zero
    assert losses[-1] < 0.5 * losses[0]
