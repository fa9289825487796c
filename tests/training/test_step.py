"""Laws of an update: it learns, averages, clips, and leaves everything alone on a bad gradient."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from arcond_jax import build, types
from arcond_jax.data import images
from arcond_jax.models import losses, rar
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.training import loop, optimizer, profiling, rates, step, stopping, writer
from arcond_jax.training import state as state_lib


def one_device():
    return mesh_lib.make_mesh(devices=jax.devices()[:1])


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_same_bits(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


@dataclasses.dataclass(frozen=True)
class Run:
    """A compiled step with what it needs."""

    config: build.Config
    state: state_lib.TrainState  # on the host: the step takes its own copy
    step_fn: object
    tokenizer: object

    def __call__(self, state, batch):
        # Always in the same places, or the step would be traced anew.
        state, batch = jax.device_put((state, batch), mesh_lib.replicated(one_device()))
        return self.step_fn(state, self.tokenizer, batch)


@functools.cache
def fitted_tokenizer(variant):
    return build.tokenizer(tiny.config(variant))


def make_run(variant, *overrides):
    config, mesh = tiny.config(variant, *overrides), one_device()
    tokenizer = fitted_tokenizer(variant)
    return Run(
        config,
        host(build.train_state(config, mesh)),
        build.train_step(config, mesh, tokenizer),
        tokenizer,
    )


@pytest.fixture(scope="module")
def joint():
    return make_run("joint")


def loss_before_and_after(run, num_steps):
    """On one batch and with the noise of step 0 both times."""
    batch = tiny.batch(run.config)
    state, metrics = run(run.state, batch)
    before = float(metrics["loss"])
    for _ in range(num_steps - 1):
        state, _ = run(state, batch)
    after = float(run(state.replace(step=np.int32(0)), batch)[1]["loss"])
    return before, after


@pytest.mark.parametrize(
    ("variant", "share"),
    [
        pytest.param("joint", 0.9, marks=pytest.mark.long),
        pytest.param("ar", 0.95, marks=pytest.mark.slow),
        pytest.param("tensorar", 0.9, marks=pytest.mark.slow),
        pytest.param("base", 0.9, marks=pytest.mark.slow),
    ],
)
def test_loss_falls_in_20_steps(request, variant, share):
    run = request.getfixturevalue("joint") if variant == "joint" else make_run(variant)
    before, after = loss_before_and_after(run, 20)
    assert after < share * before


@pytest.mark.long
def test_bfloat16_trains_float32_parameters():
    config, tokenizer = tiny.config("ar", "training.dtype=bfloat16"), fitted_tokenizer("ar")
    shapes = nn.unbox(build.abstract_state(config))
    params = host(tiny.random_params(shapes.params))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = state.replace(params=params, ema=params)
    run = Run(config, state, build.train_step(config, one_device(), tokenizer), tokenizer)
    state, metrics = run(run.state, tiny.batch(config))
    assert np.isfinite(float(metrics["loss"]))
    assert float(metrics["gradient_norm"]) > 0.0
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {
        jnp.dtype("float32")
    }


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters(joint):
    good = tiny.batch(joint.config)
    bad = good.replace(image=np.where(np.arange(16)[:, None, None, None] == 3, np.nan, good.image))
    state, _ = joint(joint.state, good)  # moments are no longer zero
    before = host(state)
    state, metrics = joint(state, bad)
    for name in ("params", "ema", "opt_state", "rng"):
        assert_same_bits(getattr(state, name), getattr(before, name))
    assert (int(state.step), int(state.skipped_in_a_row), int(state.skipped)) == (2, 1, 1)
    assert float(metrics["skipped_updates"]) == 1.0
    assert not np.isfinite(float(metrics["gradient_norm"]))

    state, _ = joint(state, bad)
    assert (int(state.skipped_in_a_row), int(state.skipped)) == (2, 2)
    state, _ = joint(state, good)
    assert (int(state.step), int(state.skipped_in_a_row), int(state.skipped)) == (4, 0, 2)
    assert np.any(state.params["final_norm"]["scale"] != before.params["final_norm"]["scale"])


class Repeated:
    """The same batch for ever."""

    def __init__(self, batch):
        self.batch = batch

    def __next__(self):
        return self.batch


def run_loop(run, iterator, workdir, num_train_steps, saved, profile=None):
    result = loop.train(
        jax.tree.map(jnp.asarray, run.state),
        iterator,
        step_fn=run,
        num_train_steps=num_train_steps,
        intervals=loop.Intervals(log=1, samples=None, checkpoint=1),
        save=lambda step, state: saved.append(step),
        draw_samples=lambda step, state: None,
        stop=stopping.Stop(),
        workdir=workdir,
        work=rates.Work(run.config.data.batch_size, lambda state, batch: 3e9),
        writers=writer.make_writers(workdir, resume_at=0),
        profile=profile,
    )
    return result


def test_the_rates_of_a_line_are_those_of_its_steps(joint, tmp_path):
    good = tiny.batch(joint.config)
    run_loop(joint, Repeated(good), tmp_path, 3, [], profiling.Span(1, 2))
    for row in writer.read_rows(tmp_path / "metrics.jsonl"):
        per_second = row["steps_per_second"]
        assert row["images_per_second"] == pytest.approx(16 * per_second)
        assert row["device_teraflops"] == pytest.approx(3e-3 * per_second)
        assert 0 <= row["data_wait_share"] < 1
        assert "mfu" not in row  # nobody says how much a CPU can do
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_peaks_are_found_by_the_kind_of_a_device():
    kinds = "TPU v5 lite", "TPU v5p", "TPU v6 lite", "NVIDIA H100 80GB HBM3", "cpu"
    assert [rates.peak(kind) for kind in kinds] == [197.0, 459.0, 918.0, 989.4, None]


def test_a_tenth_of_bad_gradients_stops_the_loop(joint, tmp_path):
    good = tiny.batch(joint.config)
    bad, saved = good.replace(image=np.full_like(good.image, np.nan)), []
    with pytest.raises(loop.DivergedError, match="11 of 22 gradients were not finite"):
        run_loop(joint, itertools.cycle((good, bad)), tmp_path, 100, saved)
    assert saved == list(range(1, 22, 2))
    rows = writer.read_rows(tmp_path / "metrics.jsonl")
    assert [row["loss"] is None for row in rows] == [False, True] * 10 + [False]


def test_ten_bad_gradients_in_a_row_stop_the_loop(joint, tmp_path, capsys):
    good = tiny.batch(joint.config)
    bad = good.replace(image=np.full_like(good.image, np.nan))
    saved = []
    with pytest.raises(loop.DivergedError) as raised:
        run_loop(joint, Repeated(bad), tmp_path, 100, saved)
    assert saved == []  # parameters that lead nowhere would push out good ones
    message = str(raised.value)
    assert message.startswith("10 gradients in a row, the last at step 10, were not finite")
    assert "training.learning_rate" in message and "--restart_from" in message
    assert "\n" not in message

    state = run_loop(joint, Repeated(good), tmp_path, 3, saved)
    assert int(state.step) == 3 and saved == [1, 2, 3]
    assert "step 3/3  loss" in capsys.readouterr().out


@dataclasses.dataclass(frozen=True)
class Regression:
    """A generator whose gradient is known: least squares, with or without noise on the target."""

    noise: float = 0.0

    def init(self, rng):
        return {"kernel": jnp.arange(4.0)}

    def loss(self, params, tokens, prompt, rng, *, step=0):
        target = prompt + self.noise * jax.random.normal(rng, prompt.shape)
        loss = jnp.mean((tokens.latents[:, 0] @ params["kernel"] - target) ** 2)
        return loss, {"loss": loss, "step": jnp.asarray(step, jnp.float32)}


@flax.struct.dataclass
class Identity:
    """A tokenizer for images that are tokens already."""

    code_law = None

    def store(self, image):
        return types.Stored(latents=image[:, 0])

    def tokens(self, stored, rng=None):
        return types.Tokens(latents=stored.latents)

    def encode(self, image, rng=None):
        return self.tokens(self.store(image))

    def decode(self, tokens):
        return tokens.latents[:, None]


@flax.struct.dataclass
class Coded:
    """A tokenizer of the signs of what images hold."""

    code_law = None

    def store(self, image):
        return types.Stored(codes=(image[:, 0, 0] > 0).astype(jnp.int32))

    def tokens(self, stored, rng=None):
        return types.Tokens(codes=stored.codes)

    def encode(self, image, rng=None):
        return self.tokens(self.store(image))

    def decode(self, tokens):
        return tokens.codes[:, None, None].astype(jnp.float32)


REGRESSION_BATCH = types.Batch(
    image=jax.random.normal(jax.random.key(1), (8, 1, 1, 4)), prompt=jnp.arange(8) % 3
)


def state_and_step(generator, update, *, ema_decay=0.0, num_accumulations=1):
    """A fresh state and the compiled update."""
    state = state_lib.create(generator, update, seed=0, mesh=one_device())
    step_fn = functools.partial(
        step.train_step,
        generator=generator,
        tokens_of=lambda tokenizer, batch, rng: tokenizer.encode(batch.image, rng),
        optimizer=update,
        rate=optax.constant_schedule(1.0),
        ema_decay=ema_decay,
        num_accumulations=num_accumulations,
    )
    return state, jax.jit(step_fn)


def regression_step(generator, update, **options):
    state, step_fn = state_and_step(generator, update, **options)
    after, metrics = step_fn(state, Identity(), REGRESSION_BATCH)
    return state, after, metrics


def test_uint8_gives_the_tokens_of_the_floats():
    image_uint8 = np.arange(512, dtype=np.uint8).reshape(2, 16, 16, 1)
    tokens_of = jax.jit(build.tokens_of)
    rows = [
        tokens_of(Identity(), types.Batch(image, np.zeros(2, int)), jax.random.key(2)).latents
        for image in (image_uint8, images.uint8_to_image(image_uint8))
    ]
    np.testing.assert_array_equal(*rows)


def regression_gradient(generator, params, rng, rows=slice(None)):
    part = jax.tree.map(lambda x: x[rows], REGRESSION_BATCH)
    tokens = Identity().encode(part.image)
    return jax.grad(lambda p: generator.loss(p, tokens, part.prompt, rng)[0])(params)["kernel"]


def test_accumulation_is_the_mean_of_the_gradients_of_the_pieces():
    generator = Regression(noise=1.0)
    state, after, metrics = regression_step(generator, optax.sgd(1.0), num_accumulations=4)
    rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), 0)
    pieces = [
        regression_gradient(generator, state.params, jax.random.fold_in(rng, i), slice(i, None, 4))
        for i in range(4)
    ]
    expected = sum(pieces) / 4
    np.testing.assert_allclose(
        state.params["kernel"] - after.params["kernel"], expected, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(metrics["gradient_norm"], jnp.linalg.norm(expected), rtol=1e-5)


def test_accumulation_without_noise_is_the_whole_batch():
    whole, pieces = (
        regression_step(Regression(), optax.sgd(1.0), num_accumulations=n)[1:] for n in (1, 2)
    )
    np.testing.assert_allclose(whole[0].params["kernel"], pieces[0].params["kernel"], rtol=1e-5)
    np.testing.assert_allclose(whole[1]["loss"], pieces[1]["loss"], rtol=1e-6)


def metrics_of_steps(generator, tokenizer, num_steps, **options):
    """The metrics of the first steps."""
    state, step_fn = state_and_step(generator, optax.sgd(0.1), **options)
    seen = []
    for _ in range(num_steps):
        state, metrics = step_fn(state, tokenizer, REGRESSION_BATCH)
        seen.append(metrics)
    return seen


@pytest.mark.parametrize("num_accumulations", [1, 4])
def test_the_loss_knows_how_many_updates_there_were(num_accumulations):
    seen = metrics_of_steps(Regression(), Identity(), 3, num_accumulations=num_accumulations)
    assert [metrics["step"] for metrics in seen] == [0.0, 1.0, 2.0]


@pytest.mark.slow
def test_random_orders_end_where_they_are_told_to():
    sizes = dict(depth=1, width=8, num_heads=1, mlp_hidden=8, attention_dropout=0.0, dropout=0.0)
    network = rar.RAR(grid=(1, 4), num_codes=2, num_classes=3, **sizes)
    generator = rar.Generator(network, (losses.CodeLoss(),), shuffle_start=1, shuffle_stop=2)
    seen = metrics_of_steps(generator, Coded(), 4)
    assert [metrics["shuffled"] for metrics in seen] == [1.0, 1.0, 0.0, 0.0]


def test_the_average_moves_towards_the_new_parameters():
    state, after, _ = regression_step(Regression(), optax.sgd(0.1), ema_decay=0.75)
    expected = 0.75 * state.ema["kernel"] + 0.25 * after.params["kernel"]
    np.testing.assert_allclose(after.ema["kernel"], expected, rtol=1e-6)
    assert np.any(after.params["kernel"] != state.params["kernel"])


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    grads = jax.tree.map(lambda x: 100.0 * x, params)
    options = dict(b1=0.9, b2=0.95, weight_decay=0.0)
    rate = optax.constant_schedule(1.0)

    def first_moment(clip_norm):
        update = optimizer.adamw(rate, clip_norm=clip_norm, **options)
        _, opt_state = update.update(grads, update.init(params), params)
        return optax.tree.get(opt_state, "mu")

    clipped, free = (optax.tree.norm(first_moment(clip)) / (1 - 0.9) for clip in (2.0, None))
    np.testing.assert_allclose(clipped, 2.0, rtol=1e-5)
    np.testing.assert_allclose(free, 100.0 * np.sqrt(7.0), rtol=1e-5)


def test_weight_decay_leaves_out_vectors_even_where_layers_are_stacked():
    config = tiny.config(
        "joint", "model.depth=3", "model.qk_norm=True", "training.weight_decay=0.5"
    )
    generator, (update, _) = build.generator(config), build.optimizer(config)
    shapes = nn.unbox(jax.eval_shape(generator.init, jax.random.key(0)))

    @jax.jit
    def first_update():
        params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return update.update(zeros, update.init(params), params)[0]

    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/"): bool(np.any(leaf))
        for path, leaf in jax.tree_util.tree_flatten_with_path(first_update())[0]
    }
    vectors = {"scale", "bias", "gain"}
    matrices = {"kernel", "table", "head_position", "position", "queries"}
    matrices |= {"pad"}  # stands in the place of a row of a table
    assert {name.split("/")[-1] for name in moved} == vectors | matrices
    assert {name for name, decayed in moved.items() if decayed} == {
        name for name in moved if name.split("/")[-1] in matrices
    }


def test_learning_rate_at_its_corners():
    def curve(decay, num_warmup_steps=10):
        return optimizer.learning_rate(
            2.0, num_train_steps=50, num_warmup_steps=num_warmup_steps, decay=decay
        )

    for decay in optimizer.DECAYS:
        rate = curve(decay)
        np.testing.assert_allclose(rate(0), 0.2, rtol=1e-6)  # the first update already moves
        np.testing.assert_allclose(rate(10), 2.0, rtol=1e-6)
        assert np.all(np.diff([rate(i) for i in range(11)]) > 0)
        np.testing.assert_allclose(curve(decay, 0)(0), 2.0, rtol=1e-6)
    ends = {decay: (float(curve(decay)(30)), float(curve(decay)(50))) for decay in optimizer.DECAYS}
    np.testing.assert_allclose(ends["constant"], (2.0, 2.0))
    np.testing.assert_allclose(ends["linear"], (1.0, 0.0), atol=1e-6)
    np.testing.assert_allclose(ends["cosine"], (1.0, 0.0), atol=1e-6)
    assert float(curve("cosine")(20)) > float(curve("linear")(20))


def test_learning_rate_errors():
    with pytest.raises(ValueError, match="decay 'square' is not one of constant, linear, cosine"):
        optimizer.learning_rate(1.0, num_train_steps=2, num_warmup_steps=0, decay="square")
    with pytest.raises(ValueError, match="num_warmup_steps 3 is more than num_train_steps 2"):
        optimizer.learning_rate(1.0, num_train_steps=2, num_warmup_steps=3, decay="linear")
