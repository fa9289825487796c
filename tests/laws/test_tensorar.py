"""Windows, their noise, and the two query transformers that start as the plain model."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from arcond_jax import types
from arcond_jax.models import causal, gpt, llamagen, magvit2, rar, tensorar, windows
from arcond_jax.nn import factors, norm
from arcond_jax.sampling import heads, raster
from arcond_jax.transport import refiners

NUM_CODES, WIDTH, LENGTH, WINDOW = 12, 32, 4, 3
BACKBONE = gpt.GPT(depth=2, width=WIDTH, num_heads=2, grid=(2, 2), mlp_hidden=48)
LLAMAGEN = llamagen.LlamaGen(backbone=BACKBONE, num_classes=3, num_codes=NUM_CODES)


def windowed(inner):
    return tensorar.Windowed(inner=inner, window=WINDOW, num_heads=2, depth=1)


def forward(network):
    """Logits of all entries at all positions, from the windows shown."""

    @jax.jit
    def run(params, token, label):
        apply = functools.partial(network.apply, {"params": params})
        cond = apply(token, label, jnp.arange(LENGTH), method=causal.teacher_forced)
        rows = apply(cond, windows.ahead(jnp.arange(LENGTH), network.window), method="rows")
        return apply(rows, jnp.zeros((*rows.shape[:-1], 0), int), method="factor_logits")

    return run


def init(network):
    return lambda rng: nn.unbox(causal.Generator(network, ()).init(rng))


def without_gain(params):
    return params | {
        name: params[name] | {"gain": jnp.zeros_like(params[name]["gain"])}
        for name in ("window_encoder", "window_decoder")
    }


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(jax.eval_shape(init(windowed(LLAMAGEN)), jax.random.key(0)))


@pytest.fixture(scope="module")
def inner_params(params):
    return {name: value for name, value in params.items() if "window" not in name}


@pytest.fixture(scope="module")
def forward_3():
    return forward(windowed(LLAMAGEN))


@pytest.fixture(scope="module")
def codes():
    return jax.random.randint(jax.random.key(3), (2, LENGTH), 0, NUM_CODES)


@pytest.fixture(scope="module")
def drafts(codes):
    """Windows that start with the codes, with anything behind them, all shown."""
    beyond = jax.random.randint(jax.random.key(6), (*codes.shape, 2), 0, NUM_CODES)
    return shown(jnp.concatenate([codes[..., None], beyond], axis=-1))


def shown(held):
    """As they are fed, that of the last position left out."""
    fed = held[:, :-1]
    return types.Token(codes=fed[..., None], seen=jnp.ones(fed.shape, bool))


LABEL = jnp.array([0, 2])


def test_windows_hold_what_comes_next():
    codes = jnp.array([[5, 6, 7, 8]])
    held = windows.of(codes, WINDOW)
    assert held[0].tolist() == [[5, 6, 7], [6, 7, 8], [7, 8, 0], [8, 0, 0]]
    np.testing.assert_array_equal(windows.inside(4, WINDOW), held[0] != 0)
    np.testing.assert_array_equal(windows.of(codes, 1), codes[..., None])
    in_factors = windows.of(jnp.stack([codes, -codes], axis=-1), WINDOW)
    np.testing.assert_array_equal(in_factors, jnp.stack([held, -held], axis=-1))


@pytest.mark.parametrize("drafts", windows.SHOWN)
def test_the_first_entries_are_shown_and_none_beyond_the_end(drafts):
    codes = MANY[..., None]
    token = windows.Drafts(drafts, "none")(
        causal.given(codes, None, WINDOW),
        codes,
        jax.random.key(0),
        factor_sizes=(NUM_CODES,),
        draw=lambda rng: pytest.fail("nothing is drawn"),
    )
    np.testing.assert_array_equal(token.codes, windows.of(codes, WINDOW)[:, :-1])
    length = np.sum(token.seen, axis=-1)
    np.testing.assert_array_equal(token.seen, np.arange(WINDOW) < length[..., None])
    most = np.sum(windows.inside(MANY.shape[1], WINDOW)[:-1], axis=-1)
    if drafts == "random":  # any number is as likely as any other
        share = np.mean(length[:, 0, None] == np.arange(1, WINDOW + 1), axis=0)
        np.testing.assert_allclose(share, 1 / WINDOW, atol=4 / np.sqrt(WINDOW * len(MANY)))
        assert np.all(length >= 1) and np.all(length <= most)
    else:
        np.testing.assert_array_equal(
            length, np.broadcast_to(1 if drafts == "masked" else most, length.shape)
        )


def test_noise_levels_grow_from_nothing_and_never_reach_one():
    # The printed values for windows of 4, to three digits.
    expected = {
        "linear": [0, 0.25, 0.5, 0.75],
        "sine": [0, 0.383, 0.707, 0.924],
        "sqrt": [0, 0.5, 0.707, 0.866],
        "exponential": [0, 0.165, 0.378, 0.650],
    }
    assert expected.keys() == windows.SCHEDULES.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(windows.noise_levels(name, 4), values, atol=5e-4)
        levels = windows.noise_levels(name, 16)
        assert levels[0] == 0 and np.all(np.diff(levels) > 0) and levels[-1] < 1


LEVELS = np.array([0.0, 0.4, 0.8], np.float32)
MANY = jax.random.randint(jax.random.key(4), (3000, 5), 0, NUM_CODES)
CLEAN = np.asarray(windows.of(MANY, WINDOW))
INSIDE = np.broadcast_to(windows.inside(MANY.shape[1], WINDOW), CLEAN.shape)
CODEBOOK = jax.random.normal(jax.random.key(5), (NUM_CODES, 3))


def categorical(rng, nested):
    sizes = (NUM_CODES,)
    noised = windows.categorical_noise(
        rng, MANY[..., None], levels=LEVELS, factor_sizes=sizes, nested=nested
    )
    return np.asarray(noised[..., 0])


def codebook(rng, nested=False, codes=MANY, levels=LEVELS, codebook=CODEBOOK, **options):
    noised = windows.codebook_noise(
        rng, codes[..., None], levels=levels, codebook=codebook, nested=nested, **options
    )
    return np.asarray(noised[..., 0])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("noise", [categorical, codebook])
def test_noise_spares_the_first_entry_and_grows_behind_it(noise, nested):
    noised = noise(jax.random.key(0), nested)
    np.testing.assert_array_equal(noised[..., 0], CLEAN[..., 0])
    assert noised.min() >= 0 and noised.max() < NUM_CODES
    changed = np.mean(noised != CLEAN, axis=(0, 1), where=INSIDE)
    assert changed[0] == 0.0 < changed[1] < changed[2]
    assert np.any((noised != noise(jax.random.key(1), nested))[INSIDE])


@pytest.mark.parametrize("nested", [False, True])
def test_categorical_noise_flips_at_its_level(nested):
    noised = categorical(jax.random.key(0), nested)
    for entry in (1, 2):
        flips = (noised != CLEAN)[..., entry][INSIDE[..., entry]]
        rate = LEVELS[entry] * (1 - 1 / NUM_CODES)
        assert abs(flips.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / flips.size)
    # What replaces a code is any code.
    new = noised[..., 2][((noised != CLEAN) & INSIDE)[..., 2]]
    share = np.bincount(new, minlength=NUM_CODES) / len(new)
    np.testing.assert_allclose(share, 1 / NUM_CODES, atol=5 / np.sqrt(NUM_CODES * len(new)))


@pytest.mark.parametrize("nested", [False, True])
def test_categorical_noise_replaces_all_factors_of_a_code(nested):
    sizes = (3, 4)
    codes = factors.split(MANY, sizes)
    noised = np.asarray(
        windows.categorical_noise(
            jax.random.key(0), codes, levels=LEVELS, factor_sizes=sizes, nested=nested
        )
    )[:, :3, 2]
    changed = noised != windows.of(codes, WINDOW)[:, :3, 2]
    # They are replaced together, each by any of its values, whatever the others get.
    for which, kept in (((0,), 1 / 3), ((1,), 1 / 4), ((0, 1), 1 / 12)):
        rate = LEVELS[2] * (1 - kept)
        flips = changed[..., which].any(-1)
        assert abs(flips.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / flips.size)


def test_drafts_of_the_model_itself_replace_codes_at_their_level():
    codes, levels = MANY[..., None], windows.noise_levels("sine", WINDOW)
    token = windows.Drafts("noised", "self", "sine")(
        causal.given(codes, None, WINDOW),
        codes,
        jax.random.key(0),
        factor_sizes=(NUM_CODES,),
        draw=lambda rng: jnp.full((*CLEAN.shape, 1), NUM_CODES),
    )
    drawn = np.asarray(token.codes[..., 0] == NUM_CODES)
    np.testing.assert_array_equal(token.codes[..., 0][~drawn], CLEAN[:, :-1][~drawn])
    share, deviation = drawn.mean((0, 1)), np.sqrt(levels * (1 - levels) / drawn[..., 0].size)
    assert np.all(np.abs(share - levels) <= 4 * deviation)


def disagreements_along_tokens(noised):
    """How often a token flipped in one window shows another code in an earlier window.

    Entry j of window i and entry j + 1 of window i - 1 are about the same token.
    """
    later, earlier = noised[:, 1:, :-1], noised[:, :-1, 1:]
    flipped = ((noised != CLEAN) & INSIDE)[:, 1:, :-1]
    return (later != earlier)[flipped].mean()


def test_nested_noise_tells_no_more_in_many_windows_than_in_one():
    assert disagreements_along_tokens(categorical(jax.random.key(0), True)) == 0.0
    assert disagreements_along_tokens(categorical(jax.random.key(0), False)) > 0.5


def test_codebook_noise_has_the_law_of_the_naive_argmax():
    table = np.asarray(CODEBOOK, np.float64)
    table /= np.linalg.norm(table, axis=-1, keepdims=True)
    noised = codebook(jax.random.key(0))
    for entry in (1, 2):
        mixed = (1 - LEVELS[entry]) * table[:, None] + LEVELS[entry] * table[None]
        nearest = np.argmax(mixed @ table.T, axis=-1)  # by code and noise code
        for code in range(NUM_CODES):
            law = np.bincount(nearest[code], minlength=NUM_CODES) / NUM_CODES
            seen = noised[..., entry][(INSIDE & (code == CLEAN))[..., entry]]
            share = np.bincount(seen, minlength=NUM_CODES) / len(seen)
            assert np.all(np.abs(share - law) <= 5 * np.sqrt(law * (1 - law) / len(seen)) + 1e-9)


@functools.cache
def renoised(kind, nested):
    """Noise on the windows at positions 1 and 2 of 3000 rows, and these windows."""
    noise = windows.Noise(kind, LEVELS, nested)

    @jax.jit
    def put(window, rngs, position):
        return noise(window, rngs, position, factor_sizes=(NUM_CODES,), codebook=CODEBOOK)

    rngs = jax.random.split(jax.random.key(8), len(MANY))
    clean = jnp.asarray(CLEAN)[..., None]
    pair = [np.asarray(put(clean[:, at], rngs, at))[..., 0] for at in (1, 2)]
    half = put(jnp.flip(clean[:, 1], 0), jnp.flip(rngs), 1)[::-1, :, 0]  # in other company
    np.testing.assert_array_equal(half, pair[0])
    return pair


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["categorical", "codebook"])
def test_drafts_in_sampling_have_the_noise_of_training(kind, nested):
    train = np.asarray(
        (categorical if kind == "categorical" else codebook)(jax.random.key(2), nested)
    )
    for at, noised in enumerate(renoised(kind, nested), start=1):
        np.testing.assert_array_equal(noised[:, 0], CLEAN[:, at, 0])
        for entry in (1, 2):
            flips, expected = (x[:, entry] != CLEAN[:, at, entry] for x in (noised, train[:, at]))
            rate = expected.mean()
            if kind == "categorical":
                rate = LEVELS[entry] * (1 - 1 / NUM_CODES)
            deviation = np.sqrt(rate * (1 - rate) / len(MANY))
            assert abs(flips.mean() - rate) < 6 * deviation  # of a difference of two, if measured


@pytest.mark.parametrize("nested", [False, True])
def test_windows_of_sampling_share_nested_noise(nested):
    earlier, later = renoised("categorical", nested)
    flipped = later[:, 1] != CLEAN[:, 2, 1]  # entry 2 of the window before is about the same token
    disagree = (later[:, 1] != earlier[:, 2])[flipped].mean()
    assert disagree == 0.0 if nested else disagree > 0.5


def test_noise_that_is_no_function_of_codes_is_refused():
    for kind in ("self", "none"):
        with pytest.raises(ValueError, match=f"noise '{kind}' cannot be put on drafts"):
            windows.Noise(kind, LEVELS)


def test_codebook_noise_at_level_zero_is_the_identity():
    noised = codebook(jax.random.key(0), levels=np.zeros(3, np.float32))
    np.testing.assert_array_equal(noised, CLEAN)


def test_codebook_noise_on_signs_is_a_hard_switch():
    signs = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=3)))
    codes = MANY % len(signs)
    levels = np.array([0.0, 0.45, 0.55], np.float32)
    noised = codebook(jax.random.key(0), codes=codes, levels=levels, codebook=signs)
    clean = windows.of(codes, WINDOW)
    changed = (noised != clean) & INSIDE
    assert not np.any(changed[..., 1])
    flips = changed[..., 2][INSIDE[..., 2]]
    rate = 1 - 1 / len(signs)  # every code is replaced by a uniform one
    assert abs(flips.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / flips.size)


def test_without_a_window_there_is_the_plain_model_and_no_window_parameters(inner_params, codes):
    shapes = jax.eval_shape(init(LLAMAGEN), jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, inner_params)
    params = inner_params
    logits = forward(LLAMAGEN)(params, shown(codes[..., None]), LABEL)

    embedded = jnp.concatenate(
        [
            params["class_embed"]["table"][LABEL][:, None],
            params["code_embed"]["table"][codes[:, :-1]],
        ],
        axis=1,
    )

    @jax.jit
    def plain(embedded):
        h = BACKBONE.apply({"params": params["trunk"]}, embedded)[0]
        h = norm.RMSNorm().apply({"params": params["final_norm"]}, h)
        return h @ params["code_head"]["kernel"]

    np.testing.assert_array_equal(logits[..., 0, :], plain(embedded))


def test_any_window_starts_as_the_plain_model(params, inner_params, forward_3, codes, drafts):
    expected = forward(LLAMAGEN)(inner_params, shown(codes[..., None]), LABEL)[..., 0, :]
    logits = forward_3(without_gain(params), drafts, LABEL)[..., 0, :]
    np.testing.assert_array_equal(logits, expected)
    assert np.max(np.abs(forward_3(params, drafts, LABEL)[..., 0, :] - expected)) > 1e-2


GRID = dict(grid=(2, 2), depth=1, width=16, num_heads=2, mlp_hidden=32)
ANY = {
    "rar": rar.RAR(**GRID, num_codes=NUM_CODES, num_classes=3),
    "magvit2": magvit2.MAGVIT2(
        backbone=gpt.GPT(**GRID), num_classes=3, factor_sizes=(3, 4), intra_depth=1
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", ["rar", pytest.param("magvit2", marks=pytest.mark.slow)])
def test_any_model_in_windows_starts_as_itself(name, codes):
    inner, outer = ANY[name], windowed(ANY[name])
    params = tiny.random_params(jax.eval_shape(init(outer), jax.random.key(0)), 0.3)

    def run(network, params):
        """Conditions, logits of entry 0, and what is sampled."""
        given = factors.split(codes, network.factor_sizes)
        apply = functools.partial(network.apply, {"params": params})
        token, at = causal.given(given, None, network.window), jnp.arange(LENGTH)
        cond = apply(token, LABEL, at, method=causal.teacher_forced)
        rows = apply(cond, windows.ahead(jnp.arange(LENGTH), network.window), method="rows")
        logits = apply(rows[..., 0, :], given, method="all_factor_logits")
        loop = raster.Raster(network, (heads.Codes(),), trace=True)
        drawn = loop(params, jax.random.key(7), LABEL, refiner=refiners.Identity())
        return cond, logits, drawn.tokens.codes, drawn.cond

    plain = jax.jit(functools.partial(run, inner))(
        {name: value for name, value in params.items() if "window" not in name}
    )
    run_outer = jax.jit(functools.partial(run, outer))
    jax.tree.map(np.testing.assert_array_equal, run_outer(without_gain(params)), plain)
    assert np.max(np.abs(run_outer(params)[0] - plain[0])) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ANY)
def test_drafts_of_any_model_follow_the_laws_of_its_rows(name):
    network, rng = windowed(ANY[name]), jax.random.key(7)
    generator = causal.Generator(network, ())
    loop = raster.Raster(network, (heads.Codes(drafts="draw"),))

    @jax.jit
    def both(params):
        """Factors that were drawn, and those drawn again from the conditions of one pass."""
        sampled = loop(params, rng, LABEL, refiner=refiners.Identity())
        drawn = factors.split(sampled.drafts, network.factor_sizes)
        cond = generator.conditions(params, sampled.tokens, LABEL)
        rows = generator.apply(
            params, cond, windows.ahead(jnp.arange(LENGTH), WINDOW), method="rows"
        )
        laws = generator.apply(params, rows, drawn, method="all_factor_logits")

        def draw(row, position, factor):
            stream = rng
            for number in (row, position, factor):
                stream = jax.random.fold_in(stream, number)
            return jax.random.categorical(stream, laws[factor][row, position])

        every = jax.vmap(jax.vmap(draw, (None, 0, None)), (0, None, None))
        places = jnp.arange(len(LABEL)), jnp.arange(LENGTH)
        return drawn, jnp.stack([every(*places, i) for i in range(len(laws))], axis=-1)

    params = tiny.random_params(jax.eval_shape(init(network), rng), 0.3)
    np.testing.assert_array_equal(*both(params))


def test_gains_are_zero_at_initialisation():
    @jax.jit
    def gains(rng):
        params = init(windowed(LLAMAGEN))(rng)
        return params["window_encoder"]["gain"], params["window_decoder"]["gain"]

    for gain in gains(jax.random.key(0)):
        assert gain.shape == (WIDTH,) and not gain.any()


def test_windows_fed_in_reach_later_positions_only(params, forward_3, drafts):
    # Tokens and noised windows as independent inputs: in training, noised copies of later codes
    # stand in earlier windows by design.
    plain = forward_3(params, drafts, LABEL)
    for position in range(LENGTH - 1):
        for entry in range(WINDOW):
            code = drafts.codes[:, position, entry]
            other = drafts.codes.at[:, position, entry].set((code + 1) % NUM_CODES)
            token = dataclasses.replace(drafts, codes=other)
            changed = np.abs(forward_3(params, token, LABEL) - plain).max(axis=(0, 2, 3))
            assert np.all(changed[: position + 1] == 0.0)
            assert np.all(changed[position + 1 :] > 1e-4)


def test_what_is_not_shown_changes_nothing(params, forward_3, drafts):
    seen = jnp.arange(WINDOW) < 2
    hiding = dataclasses.replace(drafts, seen=jnp.broadcast_to(seen, drafts.seen.shape))
    plain = forward_3(params, hiding, LABEL)
    other = dataclasses.replace(hiding, codes=jnp.where(seen[:, None], drafts.codes, 0))
    np.testing.assert_array_equal(forward_3(params, other, LABEL), plain)
    # That it is hidden is not the same as any code there.
    assert np.abs(forward_3(params, drafts, LABEL) - plain)[:, 1:].max() > 1e-3


@pytest.mark.parametrize("mlp_ratio", [0, 4])
def test_pruned_entries_have_the_values_of_the_whole_window(mlp_ratio):
    decoder = tensorar.OutputDecoder(2, num_heads=2, window=4, mlp_ratio=mlp_ratio)
    cond = jax.random.normal(jax.random.key(0), (5, WIDTH))
    shapes = nn.unbox(
        jax.eval_shape(functools.partial(decoder.init, num_entries=4), jax.random.key(1), cond)
    )["params"]
    params = tiny.random_params(shapes)
    where = jax.random.normal(jax.random.key(2), (5, 4, WIDTH))
    for about in (None, where):

        @functools.partial(jax.jit, static_argnums=0)
        def decode(num_entries, about=about):
            told = None if about is None else about[:, :num_entries]
            return decoder.apply({"params": params}, cond, num_entries, told)

        whole = decode(4)
        assert whole.shape == (5, 4, WIDTH)
        np.testing.assert_allclose(decode(1), whole[:, :1], atol=1e-5)
        np.testing.assert_allclose(decode(3), whole[:, :3], atol=1e-5)


def count(module, *args, **options):
    init = functools.partial(module.init, **options)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), *args))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_parameter_counts_are_the_published_ones():
    d, window = WIDTH, 4
    x, seen, cond = jnp.zeros((1, window, d)), jnp.ones((1, window), bool), jnp.zeros((1, d))

    def encoder(depth, mlp_ratio):
        return count(tensorar.InputEncoder(depth, 2, mlp_ratio), x, seen)

    def decoder(depth, mlp_ratio):
        module = tensorar.OutputDecoder(depth, 2, window, mlp_ratio)
        return count(module, cond, num_entries=window)

    # Beside the blocks: positions or queries, the gain, and what stands for codes not shown.
    more, less = (window + 1) * d + 2 * d, window * d + d
    # arXiv v1: two blocks of 12 d^2 on each side, with two norms each.
    assert encoder(2, 4) == 24 * d**2 + 4 * d + more
    assert decoder(2, 4) == 24 * d**2 + 4 * d + less
    # ICLR 2026: one attention layer of 4 d^2 on each side, with one norm.
    assert encoder(1, 0) == 4 * d**2 + d + more
    assert decoder(1, 0) == 4 * d**2 + d + less
