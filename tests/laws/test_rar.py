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

from arcond_jax import sharding, types
from arcond_jax.models import rar
from arcond_jax.sampling import codes as codes_lib
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
GENERATOR = rar.Generator(NETWORK, label_dropout=0.0)
RNG, LABEL = jax.random.key(5), jnp.array([0, 1, 2, 0, 1])
CODES = jax.random.randint(jax.random.key(2), (BATCH, LENGTH), 0, NUM_CODES)
ORDER = jnp.argsort(jax.random.uniform(jax.random.key(3), (BATCH, LENGTH)), axis=-1)
RASTER = rar.raster_orders(BATCH, LENGTH)
IDENTITY = refiners.Identity()
HALFWAY_RNGS = jax.random.split(jax.random.key(6), 40)


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(jax.eval_shape(GENERATOR.init, RNG), 0.3)


@jax.jit
def logits(params, codes, order, label):
    """Of all positions, in the order they are visited, which is also that of the codes."""
    return GENERATOR.logits(params, codes[:, :-1], order, label)


def visited(codes, order):
    return jnp.take_along_axis(codes, order, axis=1)


def test_a_position_knows_the_codes_visited_before_it_by_gradient(params):
    direction = jax.random.normal(jax.random.key(4), (NETWORK.width,))

    @jax.jit
    def gradient(order):
        """Of every condition in the rows of the codes fed in."""
        table = params["embed"]["table"]
        codes = jnp.arange(LENGTH)[None]  # each code its own row of the table

        def conditions(rows):
            changed = params | {"embed": {"table": table.at[:LENGTH].set(rows)}}
            cond = NETWORK.apply(
                {"params": changed}, codes[:, :-1], order, LABEL[:1], method=rar.RAR.teacher_forced
            )
            return cond[0] @ direction

        return jax.jacrev(conditions)(table[:LENGTH])

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
    def run(params, codes, label):
        return GENERATOR.logits(params, codes, RASTER[:4], label)

    args = (params, CODES[:4, :-1], LABEL[:4])
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    boxed = jax.eval_shape(GENERATOR.init, RNG)
    batch = sharding.batch_sharding(mesh)
    places = (sharding.tree_shardings(boxed, mesh), batch, batch)
    on_mesh = sharding.on_mesh(run, mesh, in_shardings=places, out_shardings=batch)
    expected = jax.jit(run)(*args)
    np.testing.assert_allclose(on_mesh(*jax.device_put(args, places)), expected, atol=2e-5)


def test_what_is_predicted_depends_on_where_it_lies_and_not_only_on_when(params):
    # Exchanging the last two positions visited changes where they lie and nothing before them.
    swapped = ORDER[:, jnp.array([0, 1, 2, 3, 5, 4])]
    codes = visited(CODES, ORDER)
    change = np.abs(logits(params, codes, swapped, LABEL) - logits(params, codes, ORDER, LABEL))
    change = change.max((0, 2))
    assert np.all(change[:4] == 0.0) and np.all(change[4:] > 1e-3)


@functools.cache
def sampler(**choices):
    draw = codes_lib.Draw(
        **{name: choices.pop(name) for name in list(choices) if name in DRAW_OPTIONS}
    )
    loop = codes_lib.CodeSampler(NETWORK, (draw,), **choices)

    @jax.jit
    def sample(params, rng, label, first_row):
        return loop(params, rng, label, refiner=IDENTITY, first_row=first_row)

    return sample


DRAW_OPTIONS = {field.name for field in dataclasses.fields(codes_lib.Draw)}


def drawn(params, label=LABEL, first_row=0, **choices):
    return sampler(**choices)(params, RNG, label, first_row).tokens.codes


@pytest.fixture(scope="module")
def traced(params):
    return sampler(trace=True)(params, RNG, LABEL, 0)


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
    codes = drawn(params, guidance_scale=scale, guidance_power=power, top_k=1)
    conditional = logits(params, codes, RASTER, LABEL)
    unconditional = logits(params, codes, RASTER, jnp.full_like(LABEL, NUM_CLASSES))
    weight = 1 + (scale - 1) * (1 - np.cos(np.pi * (np.arange(LENGTH) / LENGTH) ** power)) / 2
    guided = unconditional + weight[:, None] * (conditional - unconditional)
    np.testing.assert_array_equal(codes, jnp.argmax(guided, axis=-1))
    assert np.any(codes != jnp.argmax(conditional, axis=-1))


@pytest.mark.parametrize(
    "choices",
    [
        dict(guidance_scale=1.0, guidance_power=2.0, top_k=NUM_CODES, top_p=1.0, min_p=0.0),
        dict(guidance_scale=3.0, guided_positions=0),
    ],
)
def test_what_changes_nothing_changes_nothing(params, plain, choices):
    np.testing.assert_array_equal(drawn(params, **choices), plain)


def test_a_row_does_not_depend_on_its_batch(params, plain):
    for start in (0, 3):
        rows = slice(start, start + 2)
        alone = drawn(params, LABEL[rows], start, trace=True)
        np.testing.assert_array_equal(alone, plain[rows])


def test_impossible_choices_are_refused():
    with pytest.raises(ValueError, match="2 draws do not fit codes of 1 factors"):
        codes_lib.CodeSampler(NETWORK, (codes_lib.Draw(), codes_lib.Draw()))
    with pytest.raises(ValueError, match=r"temperature 0\.0 must be positive"):
        codes_lib.Draw(temperature=0.0)


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
        rar.Generator(NETWORK, shuffle_start=3)
    with pytest.raises(ValueError, match="shuffle_start 3 must be less than shuffle_stop 3"):
        rar.Generator(NETWORK, shuffle_start=3, shuffle_stop=3)


def test_loss_needs_codes(params):
    with pytest.raises(ValueError, match="RAR models codes"):
        GENERATOR.loss(params, types.Tokens(latents=jnp.zeros((5, 6, 2))), LABEL, RNG)


def test_loss_falls_with_dropout_in_random_orders():
    network = NETWORK.clone(attention_dropout=0.1, dropout=0.1)
    generator = rar.Generator(network)
    tokens = types.Tokens(codes=jnp.broadcast_to(jnp.arange(LENGTH) % NUM_CODES, (BATCH, LENGTH)))
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
    np.testing.assert_allclose(losses[0], np.log(NUM_CODES), rtol=0.05)
    assert losses[-1] < 0.5 * losses[0]
