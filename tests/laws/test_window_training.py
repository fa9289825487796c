"""Windows and drafters in training: what is frozen, how fast the rest learns, what is measured."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import toy_model

from arcond_jax import build, types
from arcond_jax.models import causal, gpt, llamagen, losses, magvit2, rar, tensorar, windows
from arcond_jax.nn import factors
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.sampling import heads, raster
from arcond_jax.training import optimizer
from arcond_jax.transport import refiners

NUM_CODES, LENGTH, WINDOW, DEPTH = 12, 4, 3, 5
GRID = dict(grid=(2, 2), depth=1, width=16, num_heads=2, mlp_hidden=32)
LLAMAGEN = llamagen.LlamaGen(
    backbone=gpt.GPT(**GRID | {"depth": DEPTH}), num_classes=3, num_codes=NUM_CODES
)
INNER = {
    "llamagen": LLAMAGEN,
    "rar": rar.RAR(**GRID, num_codes=NUM_CODES, num_classes=3),
    "magvit2": magvit2.MAGVIT2(
        backbone=gpt.GPT(**GRID), num_classes=3, factor_sizes=(3, 4), intra_depth=1
    ),
}
LABEL = jnp.array([0, 2, 1, 1])
CODES = jax.random.randint(jax.random.key(3), (len(LABEL), LENGTH), 0, NUM_CODES)
TOKENS = types.Tokens(codes=CODES)


def windowed(inner, window=WINDOW, **options):
    return tensorar.Windowed(inner=inner, window=window, num_heads=2, depth=1, **options)


def drafter(inner):
    return tensorar.Drafter(inner=inner, num_drafts=WINDOW - 1, num_heads=2)


def random_params(generator):
    return tiny.random_params(jax.eval_shape(generator.init, jax.random.key(0)), 0.3)


def is_own(name):
    return name in tensorar.PARTS


def names_of(tree):
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


# What is frozen.


@pytest.mark.parametrize(
    "overrides",
    [
        ("tensorar.drafter=True", "loss.w_tensor=1"),
        pytest.param(("tensorar.base_rate=0",), marks=pytest.mark.slow),
    ],
)
def test_a_frozen_base_stays_the_same_to_the_last_bit(overrides):
    config, mesh = (
        tiny.config("tensorar", *overrides),
        mesh_lib.make_mesh(devices=jax.devices()[:1]),
    )
    tokenizer = build.tokenizer(config)
    shapes = nn.unbox(build.abstract_state(config))
    params = tiny.random_params(shapes.params)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    state = state.replace(params=params, ema=jax.tree.map(jnp.copy, params))
    before = jax.tree.map(np.array, params)
    step_fn = build.train_step(config, mesh, tokenizer)
    for _ in range(3):
        arguments = jax.device_put(
            (state, tokenizer, tiny.batch(config)), mesh_lib.replicated(mesh)
        )
        state, metrics = step_fn(*arguments)
    assert float(metrics["gradient_norm"]) > 0
    for name in before:
        for tree in (state.params, state.ema):
            same = [
                np.array_equal(x, y)
                for x, y in zip(
                    jax.tree.leaves(before[name]), jax.tree.leaves(tree[name]), strict=True
                )
            ]
            assert not all(same) if is_own(name) else all(same)
    moments = optax.tree.get(state.opt_state, "mu")
    assert names_of(moments) == [x for x in names_of(params) if is_own(x.split("/")[0])]


def test_guesses_have_no_gradient_in_the_base_and_no_pass_back_through_it():
    def gradient(network, loss, **options):
        generator = causal.Generator(network, (loss,), label_dropout=0.0, **options)
        return generator, jax.grad(
            lambda params: generator.loss(params, TOKENS, LABEL, jax.random.key(0))[0]
        )

    def passes_back(network, loss, **options):
        generator, grad = gradient(network, loss, **options)
        text = str(jax.make_jaxpr(grad)(random_params(generator)))
        return len(re.findall(rf"length={DEPTH}[^\[]*?reverse=True", text))

    frozen = (drafter(LLAMAGEN), losses.DraftLoss())
    assert passes_back(*frozen, frozen=True) == 0
    assert passes_back(windowed(LLAMAGEN), losses.CodeLoss()) > 0
    generator, grad = gradient(*frozen, frozen=True)
    for name, tree in jax.jit(grad)(random_params(generator)).items():
        assert is_own(name) == any(np.any(x) for x in jax.tree.leaves(tree))


# How fast the rest learns.

PARAMS = {"trunk": {"kernel": jnp.ones((2, 2))}, "window_decoder": {"kernel": jnp.ones(3)}}
GRADS = jax.tree.map(lambda x: 50.0 * x, PARAMS)


def updated(base_rate, clip_norm=None):
    update = optimizer.adamw(
        optax.constant_schedule(0.01),
        b1=0.9,
        b2=0.95,
        weight_decay=0.0,
        clip_norm=clip_norm,
        own=tensorar.PARTS,
        base_rate=base_rate,
    )
    return update.update(GRADS, update.init(PARAMS), PARAMS)


@pytest.mark.parametrize("base_rate", [0.0, 0.1, 1.0])
def test_the_base_moves_at_its_share_of_the_rate(base_rate):
    """Adam's first step has the size of the rate, whatever the gradient."""
    updates, _ = updated(base_rate)
    np.testing.assert_allclose(updates["window_decoder"]["kernel"], -0.01, rtol=1e-5)
    np.testing.assert_allclose(updates["trunk"]["kernel"], -0.01 * base_rate, rtol=1e-5)


def test_both_rates_share_one_limit_of_the_gradient():
    _, state = updated(0.1, clip_norm=1.0)
    moments = [x for path, x in optax.tree.get_all_with_path(state, "mu")]
    norm = optax.tree.norm(moments) / (1 - 0.9)
    np.testing.assert_allclose(norm, 1.0, rtol=1e-5)


def test_one_rate_keeps_the_optimizer_of_every_earlier_run():
    state = nn.unbox(build.abstract_state(tiny.config("tensorar")))
    mask = functools.partial(jax.tree.map, lambda x: True)
    adamw = optax.adamw(optax.constant_schedule(1e-3), mask=mask)
    before = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(
        jax.eval_shape(before.init, state.params)
    )


# What is trained.


@pytest.mark.parametrize("guesses", [False, True])
def test_weights_of_entries_make_the_mean_of_their_losses(guesses):
    weights = (1.0, 3.0)
    if guesses:
        network, loss = drafter(LLAMAGEN), losses.DraftLoss(weights)
    else:
        network, loss = windowed(LLAMAGEN), losses.CodeLoss(0.5, 2.0, weights)
    generator = causal.Generator(network, (loss,))
    total, parts = jax.jit(generator.loss)(
        random_params(generator), TOKENS, LABEL, jax.random.key(0)
    )
    one, two = (parts[f"cross_entropy/draft_{j}"] for j in (1, 2))
    wanted = (one + 3 * two) / 4
    if not guesses:
        wanted = 0.5 * (parts["cross_entropy"] + 2.0 * wanted)
    np.testing.assert_allclose(total, wanted, rtol=1e-6)


def test_nothing_is_dropped_out_of_windows():
    """A mask would depend on how many rows a device has and unfolds at a time."""
    backbone = INNER["magvit2"].backbone.clone(dropout=0.5)
    inner = INNER["magvit2"].clone(backbone=backbone)
    cond = jax.random.normal(jax.random.key(1), (len(LABEL), LENGTH, 16))
    codes = factors.split(CODES, inner.factor_sizes)

    def totals(network):
        params = random_params(causal.Generator(network, ()))

        @jax.jit
        def total(rng):
            model = losses.Bound(network, {"params": params}, {"dropout": rng})
            return losses.CodeLoss()(model, cond, jnp.arange(LENGTH), codes, None, rng)[0]

        return total(jax.random.key(1)), total(jax.random.key(2))

    one, two = totals(windowed(inner))
    assert np.isfinite(one) and one == two
    one, two = totals(inner)
    assert one != two


def test_windows_around_a_head_with_parameters_and_a_loop_of_its_own():
    class Own(toy_model.Bag):
        def setup(self):
            super().setup()
            self.own_head = nn.Dense(self.num_codes)

        def all_factor_logits(self, row, factors):
            y = self.own_head(row)
            total, _ = jax.lax.scan(lambda carry, x: (carry + x, None), jnp.zeros(y.shape), y[None])
            return [total]

    network = windowed(Own(length=LENGTH, num_codes=NUM_CODES, num_classes=3, width=16))
    generator = causal.Generator(network, (losses.CodeLoss(),), label_dropout=0.0)
    params, mesh = random_params(generator), mesh_lib.make_mesh(data=4, devices=jax.devices()[:4])

    def loss(params, tokens, label):
        return generator.loss(params, tokens, label, jax.random.key(0))[0]

    run = jax.jit(jax.value_and_grad(loss))
    one, gradient = run(params, TOKENS, LABEL)
    with jax.set_mesh(mesh):
        four, on_four = run(params, *jax.device_put((TOKENS, LABEL), mesh_lib.batch_sharding(mesh)))
    np.testing.assert_allclose(four, one, rtol=1e-6)
    assert np.any(gradient["own_head"]["kernel"])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), on_four, gradient
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(window=LENGTH), dict(residual=False)])
def test_the_longest_window_and_no_residual_train_and_sample(options):
    network = windowed(INNER["rar"], **options)
    generator = rar.Generator(network, (losses.CodeLoss(),), windows.Drafts("noised"))
    update = optax.adam(1e-2)

    @jax.jit
    def trained(params):
        def body(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(
                lambda x: generator.loss(x, TOKENS, LABEL, jax.random.key(0))[0]
            )(params)
            updates, state = update.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(body, (params, update.init(params)), length=20)

    (params, _), history = trained(random_params(generator))
    assert history[-1] < 0.8 * history[0]
    loop = raster.Raster(network, (heads.Codes(drafts="feed"),))
    drawn = jax.jit(functools.partial(loop, refiner=refiners.Identity()))(
        params, jax.random.key(1), LABEL
    )
    assert drawn.drafts.shape == (len(LABEL), LENGTH, network.window)
    assert np.all((drawn.tokens.codes >= 0) & (drawn.tokens.codes < NUM_CODES))


# In any order, entries are told where they lie.


def test_a_draft_is_about_the_position_it_is_told():
    """Two drafts of the same positions in another order are the same two drafts."""
    network = drafter(INNER["rar"])
    params = random_params(causal.Generator(network, ()))
    # Without what tells entries apart by their number, positions alone do.
    params["window_decoder"]["queries"] = jnp.zeros_like(params["window_decoder"]["queries"])
    cond = jax.random.normal(jax.random.key(1), (5, GRID["width"]))
    codes = jnp.arange(5)[:, None]

    @jax.jit
    def rows(at):
        return network.apply({"params": params}, cond, codes, at[None], method="draft_rows")

    one, other, moved = (rows(jnp.array(at)) for at in ((0, 1, 2), (0, 2, 1), (0, 1, 3)))
    np.testing.assert_allclose(one, other[:, ::-1], atol=1e-5)
    assert np.abs(one[:, 0] - one[:, 1]).max() > 1e-2
    assert np.abs(one[:, 1] - moved[:, 1]).max() > 1e-2


def test_an_entry_is_about_the_position_it_is_told():
    for name, told in (("rar", True), ("llamagen", False)):
        network = windowed(INNER[name])
        params = random_params(causal.Generator(network, ()))
        cond = jax.random.normal(jax.random.key(1), (5, GRID["width"]))

        @jax.jit
        def rows(at, network=network, params=params, cond=cond):
            return network.apply({"params": params}, cond, at[None], method="rows")

        plain = rows(jnp.arange(3))
        for entry, other in ((1, (0, 3, 2)), (2, (0, 1, 3))):
            changed = np.abs(plain - rows(jnp.array(other))).max(axis=(0, 2))
            assert (changed[entry] > 1e-2) == told
            assert np.all(changed[:entry] == 0)


def test_drafts_that_are_fed_are_told_their_positions():
    for name, told in (("rar", True), ("llamagen", False)):
        network = windowed(INNER[name])
        params = random_params(causal.Generator(network, ()))
        token = types.Token(
            codes=CODES[:, :1, None, None].repeat(WINDOW, axis=2),
            seen=jnp.ones((len(LABEL), 1, WINDOW), bool),
        )

        @jax.jit
        def fed(at, network=network, params=params, token=token):
            return network.apply({"params": params}, token, at, method="embed")

        # The last entry of the window lies elsewhere; the token and the next one do not.
        one, other = (fed(jnp.array(at)) for at in ((0, 1, 2, 3), (0, 1, 3, 2)))
        assert np.any(one != other) == told


# What is measured.


def noised_and_masked(generator, rng):
    rngs, (codes, _) = generator.rngs(rng), generator.own(TOKENS)
    plain = causal.given(codes, None, WINDOW)
    noised = generator.drafts(
        plain, codes, rngs["windows"], factor_sizes=generator.network.factor_sizes, draw=pytest.fail
    )
    return codes, plain, noised


@functools.partial(jax.jit, static_argnums=0)
def laws(generator, params, token, codes):
    """Of the first factors of all entries, and the cross-entropy of entry 0 in all factors."""
    network, at = generator.network, jnp.arange(LENGTH)
    apply = functools.partial(generator.apply, params)
    cond = apply(token, LABEL, at, method=causal.teacher_forced)
    ahead = windows.ahead(at, WINDOW)
    first = apply(cond, ahead[:, :1], method="rows")
    drafts = apply(cond, codes, ahead, method="draft_rows")
    rows = jnp.concatenate([first, drafts], axis=2)
    logits = apply(rows, jnp.zeros((*rows.shape[:-1], 0), int), method="factor_logits")
    whole = apply(first[:, :, 0], codes, method="all_factor_logits")
    picked = [
        -jnp.take_along_axis(jax.nn.log_softmax(x), codes[..., i, None], axis=-1).mean()
        for i, x in enumerate(whole)
    ]
    assert network.length == LENGTH
    return jax.nn.softmax(logits), sum(picked)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "around"),
    [
        pytest.param("llamagen", windowed, marks=pytest.mark.slow),
        ("magvit2", windowed),
        ("rar", drafter),
    ],
)
def test_what_is_measured_of_windows_is_what_they_are(name, around):
    generator = causal.Generator(
        around(INNER[name]), (), windows.Drafts("noised", noise_schedule="sine"), label_dropout=0.0
    )
    rng, params = jax.random.key(5), random_params(generator)
    measured = jax.jit(generator.window_metrics)(params, TOKENS, LABEL, rng)
    if around is drafter:
        codes = factors.split(CODES, generator.network.factor_sizes)
        plain, noised = causal.given(codes, None, 1), None
    else:
        codes, plain, noised = noised_and_masked(generator, rng)
    law, masked = jax.device_get(laws(generator, params, plain, codes))
    wanted = {"windows/masked": masked}
    for j in range(1, WINDOW):
        overlaps = [
            np.minimum(law[b, i + j, 0], law[b, i, j]).sum()
            for b in range(len(LABEL))
            for i in range(LENGTH - j)
        ]
        wanted[f"windows/acceptance_{j}"] = np.mean(overlaps)
    if noised is not None:
        _, shown = laws(generator, params, noised, codes)
        wanted |= {"windows/noised": shown, "windows/leak": masked - shown}
        clean = windows.of(codes, WINDOW)[:, :-1]
        same, seen = np.all(noised.codes == clean, axis=-1), np.asarray(noised.seen)
        for j in range(1, WINDOW):
            wanted[f"windows/unchanged_{j}"] = same[..., j][seen[..., j]].mean()
    assert measured.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(measured[key], value, atol=2e-5, err_msg=key)


@pytest.mark.long
def test_what_is_measured_is_the_step_that_was_trained():
    """With the random numbers of the step, also where orders are random."""
    network = windowed(INNER["rar"].clone(dropout=0.0, attention_dropout=0.0))
    generator = rar.Generator(network, (losses.CodeLoss(),), windows.Drafts("noised"))
    arguments = (random_params(generator), TOKENS, LABEL, jax.random.key(5))
    _, trained = jax.jit(generator.loss)(*arguments)
    measured = jax.jit(generator.window_metrics)(*arguments)
    np.testing.assert_allclose(trained["cross_entropy"], measured["windows/noised"], rtol=1e-5)


def test_nothing_is_measured_without_windows():
    config = tiny.config("base")
    assert build.window_metrics(config, build.mesh(config)) is None
