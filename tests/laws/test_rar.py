"""RAR: what a position may know in any order, cached and uncached runs, sampling, loss."""

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
from arcond_jax.models import causal, losses, rar
from arcond_jax.parallel import compiled, mesh
from arcond_jax.sampling import guidance, heads, raster
from arcond_jax.transport import refiners

pytestmark = pytest.mark.slow  # minutes of compilation; tests/parity holds the arithmetic

NUM_CODES, NUM_CLASSES, LENGTH, BATCH = 11, 3, 6, 5
NETWORK = rar.RAR(
    grid=(2, 3),
    num_codes=NUM_CODES,
    num_classes=NUM_CLASSES,
    depth=2,
    width=16,
    num_heads=2,
    mlp_hidden=32,
    attention_dropout=0.0,
    dropout=0.0,
)
GENERATOR = rar.Generator(NETWORK, (losses.CodeLoss(),), label_dropout=0.0)
RNG, LABEL = jax.random.key(5), jnp.array([0, 1, 2, 0, 1])
CODES = jax.random.randint(jax.random.key(2), (BATCH, LENGTH), 0, NUM_CODES)
ORDER = jnp.argsort(jax.random.uniform(jax.random.key(3), (BATCH, LENGTH)), axis=-1)
RASTER = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
IDENTITY = refiners.Identity()
HALFWAY_RNGS = jax.random.split(jax.random.key(6), 40)


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(jax.eval_shape(GENERATOR.init, RNG), 0.3)


def conditions(params, codes, order, label):
    token = causal.given(codes[..., None], None, 1)
    return GENERATOR.apply(params, token, label, order, method=causal.teacher_forced)


@jax.jit
def logits(params, codes, order, label):
    """Of all positions, in the order they are visited, which is also that of the codes."""
    cond = conditions(params, codes, order, label)
    return GENERATOR.apply(params, cond, codes[..., None], method="all_factor_logits")[0]


def visited(codes, order):
    return jnp.take_along_axis(codes, order, axis=1)


def test_a_position_knows_the_codes_visited_before_it_by_gradient(params):
    direction = jax.random.normal(jax.random.key(4), (NETWORK.width,))

    @jax.jit
    def gradient(order):
        """Of every condition in the rows of the codes fed in."""
        table = params["embed"]["table"]
        codes = jnp.arange(LENGTH)[None]  # each code its own row of the table

        def of_rows(rows):
            changed = params | {"embed": {"table": table.at[:LENGTH].set(rows)}}
            return conditions(changed, codes, order, LABEL[:1])[0] @ direction

        return jax.jacrev(of_rows)(table[:LENGTH])

    for order in (ORDER[:1], RASTER[:1]):
        size = np.abs(gradient(order)).max(-1)
        assert np.all(size[np.triu_indices(LENGTH)] == 0.0)
        assert np.all(size[np.tril_indices(LENGTH, -1)] > 1e-5)


def test_a_position_knows_nothing_of_later_codes_in_any_order(params):
    plain = logits(params, visited(CODES, ORDER), ORDER, LABEL)
    for i in range(LENGTH):
        other = visited(CODES, ORDER).at[:, i].add(1) % NUM_CODES
        change = np.abs(logits(params, other, ORDER, LABEL) - plain).max(-1)
        assert np.all(change[:, : i + 1] == 0.0)
        assert np.all(change[:, i + 1 :].max(0, initial=0.0) > 1e-4)


def test_a_mesh_of_all_axes_changes_nothing(params):
    args = (params, CODES[:4], RASTER[:4], LABEL[:4])
    devices = mesh.make_mesh(data=2, fsdp=2, tensor=2)
    boxed = jax.eval_shape(GENERATOR.init, RNG)
    batch = mesh.batch_sharding(devices)
    places = (mesh.tree_shardings(boxed, devices), batch, batch, batch)
    on_mesh = compiled.Compiled(
        logits.__wrapped__, devices, in_shardings=places, out_shardings=batch
    )
    expected = logits(*args)
    np.testing.assert_allclose(on_mesh(*jax.device_put(args, places)), expected, atol=2e-5)


def test_one_order_may_serve_all_rows(params):
    expected = logits(params, CODES, RASTER, LABEL)
    np.testing.assert_array_equal(logits(params, CODES, RASTER[0], LABEL), expected)


def test_what_is_predicted_depends_on_where_it_lies_and_not_only_on_when(params):
    codes = visited(CODES, ORDER)
    plain = logits(params, codes, ORDER, LABEL)
    # Exchanging two positions visited changes where they lie and nothing before them.
    for order, first in (((0, 1, 2, 3, 5, 4), 4), ((1, 0, 2, 3, 4, 5), 0)):
        swapped = ORDER[:, jnp.array(order)]
        change = np.abs(logits(params, codes, swapped, LABEL) - plain).max((0, 2))
        assert np.all(change[:first] == 0.0) and np.all(change[first:] > 1e-3)


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


def test_sampled_codes_follow_the_law_of_teacher_forcing(params, plain):
    assert plain.shape == (BATCH, LENGTH) and len(np.unique(plain)) > 4
    law = logits(params, plain, RASTER, LABEL)
    rows = jax.vmap(jax.random.fold_in, (None, 0))(RNG, jnp.arange(BATCH))
    for position in range(LENGTH):
        rngs = jax.vmap(jax.random.fold_in, (0, None))(rows, position)
        rngs = jax.vmap(jax.random.fold_in, (0, None))(rngs, 0)  # the first factor
        expected = jax.vmap(jax.random.categorical)(rngs, law[:, position])
        np.testing.assert_array_equal(plain[:, position], expected)


def test_guidance_extrapolates_at_every_step(params):
    scale, power = 3.0, 1.5
    guided = dict(scale=scale, schedule="power_cosine", power=power)
    codes = drawn(params, guided=guided, top_k=1).tokens.codes
    conditional = logits(params, codes, RASTER, LABEL)
    unconditional = logits(params, codes, RASTER, jnp.full_like(LABEL, NUM_CLASSES))
    weight = 1 + (scale - 1) * (1 - np.cos(np.pi * (np.arange(LENGTH) / LENGTH) ** power)) / 2
    expected = unconditional + weight[:, None] * (conditional - unconditional)
    np.testing.assert_array_equal(codes, jnp.argmax(expected, axis=-1))
    assert np.any(codes != jnp.argmax(conditional, axis=-1))


@pytest.mark.parametrize(
    "choices",
    [
        dict(
            guided=dict(scale=1.0, schedule="power_cosine", power=2.0),
            **dict(top_k=NUM_CODES, top_p=1.0, min_p=0.0),
        ),
        dict(guided=dict(scale=float(np.nextafter(1.0, 2.0)), schedule="linear")),
        dict(guided=dict(scale=3.0, positions=0)),
    ],
)
def test_what_changes_nothing_changes_nothing(params, plain, choices):
    np.testing.assert_array_equal(drawn(params, **choices).tokens.codes, plain)


def test_a_power_of_zero_is_constant_guidance(params, plain):
    constant = drawn(params, guided=dict(scale=3.0)).tokens.codes
    power = drawn(params, guided=dict(scale=3.0, schedule="power_cosine", power=0.0)).tokens.codes
    np.testing.assert_array_equal(power, constant)
    assert np.any(constant != plain)


def test_a_row_does_not_depend_on_its_batch(params, plain):
    for start in (0, 3):
        rows = slice(start, start + 2)
        alone = drawn(params, LABEL[rows], start, trace=True)
        np.testing.assert_array_equal(alone.tokens.codes, plain[rows])


ANNEALED = dataclasses.replace(GENERATOR, shuffle_start=100, shuffle_stop=300)


@functools.partial(jax.jit, static_argnames="label_dropout")
def loss(params, rng, label, step, label_dropout=0.0):
    generator = dataclasses.replace(ANNEALED, label_dropout=label_dropout)
    return generator.loss(params, types.Tokens(codes=CODES), label, rng, step=step)


def test_loss_in_raster_order_is_the_naive_one(params):
    total, metrics = loss(params, RNG, LABEL, 300)
    log_p = np.asarray(jax.nn.log_softmax(logits(params, CODES, RASTER, LABEL)))
    naive = -np.mean([log_p[i, j, CODES[i, j]] for i in range(BATCH) for j in range(LENGTH)])
    np.testing.assert_allclose(total, naive, rtol=1e-5)
    assert metrics["shuffled"] == 0.0
    shuffled, metrics = loss(params, RNG, LABEL, 100)
    assert metrics["shuffled"] == 1.0 and abs(shuffled - total) > 1e-3
    halfway = [float(loss(params, rng, LABEL, 200)[1]["shuffled"]) for rng in HALFWAY_RNGS]
    deviation = 0.5 / np.sqrt(BATCH * len(halfway))
    assert abs(np.mean(halfway) - 0.5) < 4 * deviation


def test_without_annealing_orders_are_random_for_ever(params):
    tokens = types.Tokens(codes=CODES)
    for_ever = jax.jit(lambda step: GENERATOR.loss(params, tokens, LABEL, RNG, step=step)[0])
    annealed = loss(params, RNG, LABEL, 0)[0]
    np.testing.assert_allclose([for_ever(0), for_ever(10**9)], [annealed, annealed], rtol=1e-6)


def test_a_dropped_label_is_the_null_class(params):
    dropped = loss(params, RNG, LABEL, 200, label_dropout=1.0)[0]
    null = loss(params, RNG, jnp.full_like(LABEL, NUM_CLASSES), 200)[0]
    np.testing.assert_allclose(dropped, null, rtol=1e-6)
    assert abs(null - loss(params, RNG, LABEL, 200)[0]) > 1e-4


def test_shuffle_rate_falls_along_a_line_between_two_steps():
    rates = [rar.annealed_shuffle_rate(s, start=100, stop=300) for s in (0, 100, 150, 300, 999)]
    np.testing.assert_allclose(rates, [1.0, 1.0, 0.75, 0.0, 0.0])


def test_annealing_needs_two_steps_in_order():
    with pytest.raises(ValueError, match="shuffle_start 3 and shuffle_stop None: give both"):
        rar.Generator(NETWORK, (), shuffle_start=3)
    with pytest.raises(ValueError, match="shuffle_start 3 must be less than shuffle_stop 3"):
        rar.Generator(NETWORK, (), shuffle_start=3, shuffle_stop=3)


def test_loss_needs_codes(params):
    with pytest.raises(ValueError, match="the model predicts codes, and these tokens hold none"):
        GENERATOR.loss(params, types.Tokens(latents=jnp.zeros((5, 6, 2))), LABEL, RNG)


def test_loss_falls_with_dropout_in_random_orders():
    network = NETWORK.clone(attention_dropout=0.1, dropout=0.1)
    generator = rar.Generator(network, (losses.CodeLoss(),))
    tokens = types.Tokens(codes=jnp.broadcast_to(jnp.arange(LENGTH) % NUM_CODES, (BATCH, LENGTH)))
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
    np.testing.assert_allclose(values[0], np.log(NUM_CODES), rtol=0.05)
    assert values[-1] < 0.5 * values[0]
