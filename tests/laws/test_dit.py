"""The diffusion transformer: what its output depends on, its loss, its sampling loop."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arcond_jax import types
from arcond_jax.diffusion import gaussian, schedule, solvers
from arcond_jax.models import dit
from arcond_jax.sampling import grid, guidance
from arcond_jax.transport import refiners

pytestmark = pytest.mark.slow  # minutes of compilation; tests/parity holds the arithmetic

SETTINGS = dict(grid=(2, 3), channels=4, num_classes=3, depth=2, width=16, num_heads=2)
NETWORK = dit.DiT(**SETTINGS)
PROCESS = schedule.Schedule.cosine()
SOLVER = solvers.Solver(PROCESS.respace(schedule.trailing_timesteps(1000, 3)), clip=3.0)
GENERATOR = dit.Generator(NETWORK, PROCESS)
X = jax.random.normal(jax.random.key(1), (4, 6, 4))
T, LABEL = jnp.array([5, 400, 900, 999]), jnp.array([0, 1, 2, 1])
NO_CLASS = jnp.full(4, NETWORK.num_classes)


@pytest.fixture(scope="module")
def at_init():
    return nn.unbox(jax.jit(GENERATOR.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def params(at_init):
    """Far enough from the start for every part to matter."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), at_init)


@jax.jit
def run(params, x, t, label):
    return NETWORK.apply({"params": params}, x, t, label)


def change(a, b):
    """Of each image."""
    return np.max(np.abs(np.asarray(a - b)), axis=(1, 2))


def test_output_is_zero_at_first(at_init):
    assert not np.any(run(at_init, X, T, LABEL))


def test_time_and_class_of_an_image_matter_to_it_alone(params):
    before = run(params, X, T, LABEL)
    for t, label in ((T.at[1].set(401), LABEL), (T, LABEL.at[1].set(3))):
        changed = change(run(params, X, t, label), before) > 1e-3
        assert changed.tolist() == [False, True, False, False]
    one_time = run(params, X, jnp.array(7), LABEL)
    np.testing.assert_allclose(one_time, run(params, X, jnp.full(4, 7), LABEL), atol=1e-5)


def test_every_token_sees_every_other(params):
    before = run(params, X, T, LABEL)
    for i in range(6):
        after = run(params, X.at[:, i].add(1.0), T, LABEL)
        assert np.abs(after - before).max((0, 2)).min() > 1e-3  # in one of the images at least


def test_only_positions_tell_tokens_apart(params, monkeypatch):
    order = jnp.array([3, 0, 5, 1, 4, 2])

    def difference():
        step = jax.jit(lambda x: NETWORK.apply({"params": params}, x, T, LABEL))
        return change(step(X[:, order]), step(X)[:, order])

    assert np.all(difference() > 1e-2)
    table = dit.position_table(SETTINGS["grid"], SETTINGS["width"])
    monkeypatch.setattr(dit, "position_table", lambda grid, width: np.zeros_like(table))
    np.testing.assert_allclose(difference(), 0.0, atol=2e-5)


def test_positions_are_sinusoids_of_column_then_row():
    table = dit.position_table((2, 3), 8)
    assert table.shape == (6, 8) and len(np.unique(table.round(6), axis=0)) == 6
    np.testing.assert_allclose(table[5, :4], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)])
    np.testing.assert_allclose(table[5, 4:], [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)])
    with pytest.raises(ValueError, match="width 6 must be divisible by 4"):
        dit.position_table((2, 3), 6)


def test_ways_of_running_the_blocks_agree(params):
    unrolled = dit.DiT(**SETTINGS, unroll=SETTINGS["depth"])
    output = jax.jit(unrolled.apply)({"params": params}, X, T, LABEL)
    np.testing.assert_allclose(output, run(params, X, T, LABEL), atol=1e-4)

    def gradient(remat):
        network = dit.DiT(**SETTINGS, remat=remat)

        def loss(params):
            return jnp.mean(network.apply({"params": params}, X, T, LABEL) ** 2)

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient("none"),
        gradient("full"),
    )


def closed_count(*, depth, width, channels, num_classes):
    """Block: 3 + 1 attention, 8 MLP, 6 adaLN squares of the width. Outside: 1 time, 2 adaLN."""
    vectors = 3 * channels + 256 + num_classes + 6
    return depth * (18 * width**2 + 15 * width) + 3 * width**2 + vectors * width + 2 * channels


@pytest.mark.parametrize(
    ("size", "expected"),
    [("XL", 1_068_966_432), ("DiT-XL", 675_129_632 - 256 * 1152)],  # official, less its positions
)
def test_parameter_counts(size, expected):
    options = dit.SIZES[size]
    network = dit.DiT(grid=(16, 16), channels=16, num_classes=1000, **options)
    shapes = jax.eval_shape(dit.Generator(network, PROCESS).init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(nn.unbox(shapes)))
    print(f"DiT {size}: {count:,} parameters")
    depth, width = options["depth"], options["width"]
    assert count == closed_count(depth=depth, width=width, channels=16, num_classes=1000)
    assert count == expected


LATENTS = jax.random.normal(jax.random.key(4), (256, 6, 4))
CLASSES = jnp.arange(256) % 3


@functools.cache
def loss_of(label_dropout):
    return jax.jit(dit.Generator(NETWORK, PROCESS, label_dropout=label_dropout).loss)


def test_loss_of_an_output_of_zero_is_the_variance_of_noise(at_init):
    loss, metrics = loss_of(1.0)(at_init, types.Tokens(LATENTS), CLASSES, jax.random.key(1))
    standard_error = np.sqrt(2 / LATENTS.size)
    np.testing.assert_allclose(metrics["diffusion/mse"], 1.0, atol=4 * standard_error)
    np.testing.assert_allclose(loss, metrics["diffusion/mse"] + metrics["diffusion/vb"], rtol=1e-6)
    assert loss == metrics["loss"] == metrics["loss_diffusion"]


def test_loss_needs_latents(at_init):
    with pytest.raises(ValueError, match="these tokens hold none"):
        GENERATOR.loss(at_init, types.Tokens(), LABEL, jax.random.key(1))


def test_dropped_labels_are_those_of_no_class(params):
    def loss(label_dropout, label):
        return loss_of(label_dropout)(params, types.Tokens(LATENTS), label, jax.random.key(0))[0]

    no_class = jnp.full_like(CLASSES, NETWORK.num_classes)
    assert loss(1.0, CLASSES) == loss(1.0, no_class)
    np.testing.assert_allclose(loss(1.0, CLASSES), loss(0.0, no_class), rtol=1e-6)
    assert abs(loss(0.0, CLASSES) - loss(0.0, no_class)) > 1e-2


def test_loss_falls(at_init):
    optimizer = optax.adam(3e-3)
    label = jnp.arange(32) % 3
    # One image a class, so there is something to learn.
    tokens = types.Tokens(jax.random.normal(jax.random.key(0), (3, 6, 4))[label])

    @jax.jit
    def train(params):
        def body(carry, rng):
            params, state = carry
            (loss, _), grads = jax.value_and_grad(GENERATOR.loss, has_aux=True)(
                params, tokens, label, rng
            )
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        rngs = jax.random.split(jax.random.key(1), 30)
        return jax.lax.scan(body, (params, optimizer.init(params)), rngs)[1]

    losses = np.asarray(train(at_init))
    assert losses[-5:].mean() < 0.7 * losses[:5].mean()


@functools.cache
def sampler(**choices):
    loop = grid.GridSampler(NETWORK, SOLVER, guidance=guidance.Guidance(**choices))

    def draw(params, rng, label, first_row):
        drawn = loop(params, rng, label, refiner=refiners.Identity(), first_row=first_row)
        return drawn.tokens.latents

    return jax.jit(draw)


def sample(params, label, *, seed=0, first_row=0, **choices):
    return np.asarray(sampler(**choices)(params, jax.random.key(seed), label, first_row))


def chain(params, weights):
    """Ancestral steps one by one, the noise guided by hand and v not, from the rows' own draws."""
    process, rng = SOLVER.schedule, jax.random.key(0)
    rows = [jax.random.normal(jax.random.fold_in(rng, i), (4, 6, 4)) for i in range(4)]
    draws = jnp.stack(rows, axis=1)
    x = draws[0]
    for i, noise, weight in zip((2, 1, 0), draws[1:], weights, strict=True):
        index, t = jnp.array(i), jnp.full(4, int(process.timesteps[i]))
        told, untold = run(params, x, t, LABEL), run(params, x, t, NO_CLASS)
        predicted = untold[..., :4] + weight * (told[..., :4] - untold[..., :4])
        x0 = jnp.clip(gaussian.predict_x0(x, index, predicted, schedule=process), -3.0, 3.0)
        mean = gaussian.posterior_mean(x0, x, index, schedule=process)
        log_variance = gaussian.log_variance(told[..., 4:], index, schedule=process)
        x = mean + (i > 0) * jnp.exp(0.5 * log_variance) * noise
    return x


def test_samples_follow_the_seed_and_not_the_batch(params):
    whole = sample(params, LABEL, scale=2.0)
    assert whole.shape == (4, 6, 4)
    np.testing.assert_array_equal(whole, sample(params, LABEL, scale=2.0))
    assert np.all(change(whole, sample(params, LABEL, scale=2.0, seed=1)) > 1e-2)
    part = sample(params, LABEL[2:], scale=2.0, first_row=2)
    np.testing.assert_allclose(part, whole[2:], atol=1e-4)
    # Rows 1 and 3 share a class, not their noise.
    assert np.max(np.abs(whole[1] - whole[3])) > 1e-2


def test_guidance_does_nothing_at_scale_one_or_without_a_class(params):
    plain = sample(params, LABEL, scale=1.0)
    nearly = sample(params, LABEL, scale=float(np.nextafter(1.0, 2.0)), schedule="linear")
    np.testing.assert_allclose(nearly, plain, atol=1e-4)
    guided, unguided = (sample(params, NO_CLASS, scale=scale) for scale in (2.0, 1.0))
    np.testing.assert_allclose(guided, unguided, atol=1e-4)


def test_a_power_of_zero_is_constant_guidance(params):
    power = sample(params, LABEL, scale=2.0, schedule="power_cosine", power=0.0)
    np.testing.assert_allclose(power, sample(params, LABEL, scale=2.0), atol=1e-5)


def test_guidance_grows_with_the_share_of_the_noise_that_is_undone(params):
    """Steps at times 999, 666 and 332 undo 1, 334 and 668 of 1000."""
    linear = sample(params, LABEL, scale=2.0, schedule="linear")
    np.testing.assert_allclose(linear, chain(params, (1.001, 1.334, 1.668)), atol=1e-4)


def test_samples_are_the_chain_written_out(params):
    x = chain(params, (2.0, 2.0, 2.0))
    np.testing.assert_allclose(sample(params, LABEL, scale=2.0), x, atol=1e-4)
    assert np.all(change(x, sample(params, LABEL, scale=1.0)) > 1e-2)


def test_there_is_nothing_to_trace():
    with pytest.raises(ValueError, match="no conditions to trace"):
        grid.GridSampler(NETWORK, SOLVER, trace=True)
