"""Open-MAGVIT2: what a factor may know, factors of a code, cached runs, sampling, loss."""

import dataclasses
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
from arcond_jax.models import causal, gpt, losses, magvit2
from arcond_jax.nn import factors as factors_lib
from arcond_jax.sampling import guidance, heads, raster
from arcond_jax.transport import refiners

pytestmark = pytest.mark.slow  # minutes of compilation; tests/parity holds the arithmetic

SIZES, NUM_CLASSES, LENGTH, BATCH = (4, 8), 3, 6, 5
BACKBONE = gpt.GPT(depth=2, width=16, num_heads=2, grid=(2, 3), mlp_hidden=32)
NETWORK = magvit2.MAGVIT2(
    backbone=BACKBONE, num_classes=NUM_CLASSES, factor_sizes=SIZES, intra_depth=1
)
GENERATOR = magvit2.Generator(NETWORK, (losses.CodeLoss(),), label_dropout=0.0)
RNG, LABEL = jax.random.key(5), jnp.array([0, 1, 2, 0, 1])
CODES = jax.random.randint(jax.random.key(2), (BATCH, LENGTH), 0, math.prod(SIZES))
IDENTITY = refiners.Identity()


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(jax.eval_shape(GENERATOR.init, RNG), 0.3)


def factor_logits(generator, params, factors, label):
    """Of both factors at all positions."""
    token, at = causal.given(factors, None, 1), jnp.arange(LENGTH)
    cond = generator.apply(params, token, label, at, method=causal.teacher_forced)
    return generator.apply(params, cond, factors, method="all_factor_logits")


logits = jax.jit(functools.partial(factor_logits, GENERATOR))


def split(codes):
    return factors_lib.split(codes, SIZES)


def test_the_factors_of_a_code_are_its_bits_lowest_first():
    sizes = magvit2.FACTOR_SIZES
    codes = jax.random.randint(RNG, (3, 50), 0, 2**18)
    factors = factors_lib.split(codes, sizes)
    np.testing.assert_array_equal(factors, jnp.stack([codes % 2**6, codes >> 6], axis=-1))
    np.testing.assert_array_equal(factors_lib.join(factors, sizes), codes)
    # Of sizes that are no powers of two, and of one factor alone, every code has its own too.
    for sizes in ((3, 5, 4), (60,)):
        factors = factors_lib.split(jnp.arange(60), sizes)
        assert np.all(factors < np.array(sizes)) and len(np.unique(factors, axis=0)) == 60
        np.testing.assert_array_equal(factors_lib.join(factors, sizes), jnp.arange(60))


def test_a_factor_knows_earlier_positions_and_earlier_factors_by_gradient(params):
    # Position i has rows of its own in both tables, whose gradient is that of its factors.
    generator = magvit2.Generator(NETWORK.clone(factor_sizes=(LENGTH, LENGTH)), ())
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
        both = factor_logits(generator, changed, factors, LABEL[:1])
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
def sampler(trace, guided, **choices):
    loop = raster.Raster(
        NETWORK, (heads.Codes(**choices),), guidance=guidance.Guidance(**dict(guided)), trace=trace
    )

    @jax.jit
    def sample(params, rng, label, first_row):
        return loop(params, rng, label, refiner=IDENTITY, first_row=first_row)

    return sample


def drawn(params, label=LABEL, first_row=0, trace=False, guided=(), **choices):
    """`guided` holds names and values of `Guidance`."""
    sample = sampler(trace, tuple(dict(guided).items()), **choices)
    return sample(params, RNG, label, first_row)


@pytest.fixture(scope="module")
def traced(params):
    return drawn(params, trace=True)


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
    factors = split(plain)
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
    guided = dict(scale=scales[0], later_scale=scales[1])
    factors = split(drawn(params, guided=guided, top_k=1).tokens.codes)
    conditional = logits(params, factors, LABEL)
    unconditional = logits(params, factors, jnp.full_like(LABEL, NUM_CLASSES))
    for i, scale in enumerate(scales):
        expected = unconditional[i] + scale * (conditional[i] - unconditional[i])
        np.testing.assert_array_equal(factors[..., i], jnp.argmax(expected, axis=-1))
        assert np.any(factors[..., i] != jnp.argmax(conditional[i], axis=-1))


def test_each_factor_has_its_own_temperature(params, plain):
    factors = split(drawn(params, later_temperature=1e-5).tokens.codes)
    np.testing.assert_array_equal(factors[:, 0, 0], split(plain)[:, 0, 0])
    first, second = logits(params, factors, LABEL)
    np.testing.assert_array_equal(factors[..., 1], jnp.argmax(second, axis=-1))
    assert np.any(factors[..., 0] != jnp.argmax(first, axis=-1))


@pytest.mark.parametrize(
    "choices",
    [
        dict(
            guided=dict(scale=3.0, later_scale=1.0, positions=0),
            **dict(top_k=max(SIZES), top_p=1.0, min_p=0.0),
        ),
        dict(guided=dict(scale=float(np.nextafter(1.0, 2.0)), schedule="linear")),
    ],
)
def test_what_changes_nothing_changes_nothing(params, plain, choices):
    np.testing.assert_array_equal(drawn(params, **choices).tokens.codes, plain)


def test_a_power_of_zero_is_constant_guidance(params, plain):
    scales = dict(scale=3.0, later_scale=1.5)
    constant = drawn(params, guided=scales).tokens.codes
    power = drawn(params, guided=scales | dict(schedule="power_cosine", power=0.0)).tokens.codes
    np.testing.assert_array_equal(power, constant)
    assert np.any(constant != plain)


def test_a_row_does_not_depend_on_its_batch(params, plain):
    for start in (0, 3):
        rows = slice(start, start + 2)
        alone = drawn(params, LABEL[rows], start, trace=True)
        np.testing.assert_array_equal(alone.tokens.codes, plain[rows])


@functools.partial(jax.jit, static_argnames="label_dropout")
def loss(params, label, label_dropout=0.0):
    generator = dataclasses.replace(GENERATOR, label_dropout=label_dropout)
    return generator.loss(params, types.Tokens(codes=CODES), label, RNG)


def test_loss_is_the_sum_of_the_naive_ones(params):
    total, metrics = loss(params, LABEL)
    factors, naive = split(CODES), []
    for i, law in enumerate(logits(params, factors, LABEL)):
        log_p = np.asarray(jax.nn.log_softmax(law))
        picked = [log_p[b, j, factors[b, j, i]] for b in range(BATCH) for j in range(LENGTH)]
        naive.append(-np.mean(picked))
        np.testing.assert_allclose(metrics[f"cross_entropy/factor_{i}"], naive[-1], rtol=1e-5)
    np.testing.assert_allclose(metrics["cross_entropy"], sum(naive), rtol=1e-5)
    assert total == metrics["loss"] == metrics["loss_tensor"] == metrics["cross_entropy"]


def test_a_dropped_label_is_the_null_class(params):
    dropped = loss(params, LABEL, label_dropout=1.0)[0]
    null = loss(params, jnp.full_like(LABEL, NUM_CLASSES))[0]
    np.testing.assert_allclose(dropped, null, rtol=1e-6)
    assert abs(null - loss(params, LABEL)[0]) > 1e-4


def test_loss_needs_codes(params):
    with pytest.raises(ValueError, match="the model predicts codes, and these tokens hold none"):
        GENERATOR.loss(params, types.Tokens(latents=jnp.zeros((5, 6, 2))), LABEL, RNG)


def test_dropout_reaches_the_blocks_over_factors(params):
    network = NETWORK.clone(backbone=BACKBONE.clone(dropout=0.5))
    cond = jax.random.normal(RNG, (BATCH, BACKBONE.width))
    factors = split(CODES[:, 0])

    @jax.jit
    def laws(rngs):
        variables = {"params": params}
        return network.apply(variables, cond, factors, method="all_factor_logits", rngs=rngs)

    one, other = (laws({"dropout": jax.random.key(i)}) for i in (0, 1))
    for a, b in zip(one, other, strict=True):
        assert np.all(np.abs(a - b).max(-1) > 1e-3)


def test_loss_falls_with_dropout():
    network = NETWORK.clone(token_dropout=0.1, backbone=BACKBONE.clone(dropout=0.1))
    generator = magvit2.Generator(network, (losses.CodeLoss(),))
    tokens = types.Tokens(codes=jnp.broadcast_to(5 * jnp.arange(LENGTH), (BATCH, LENGTH)))
    update = optax.adam(1e-2)

    @jax.jit
    def step(params, state, rng):
        gradient = jax.grad(generator.loss, has_aux=True)
        grads, metrics = gradient(params, tokens, LABEL, rng)
        updates, state = update.update(grads, state)
        return optax.apply_updates(params, updates), state, metrics["loss"]

    params = nn.unbox(jax.jit(generator.init)(jax.random.key(0)))
    state, values = update.init(params), []
    for i in range(20):
        params, state, value = step(params, state, jax.random.key(i))
        values.append(float(value))
    np.testing.assert_allclose(values[0], np.log(math.prod(SIZES)), rtol=1e-5)  # heads are zero
    assert values[-1] < 0.5 * values[0]
