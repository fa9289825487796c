"""Windows, their noise, and the two query transformers that start as the plain model."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from arcond_jax.models import gpt, tensorar
from arcond_jax.models.joint import Joint
from arcond_jax.nn import norm

NUM_CODES, WIDTH, LENGTH = 12, 32, 4
PAD = NUM_CODES
BACKBONE = gpt.GPT(depth=2, width=WIDTH, num_heads=2, grid=(2, 2), mlp_hidden=48)


def network(window):
    return Joint(BACKBONE, num_classes=3, num_codes=NUM_CODES, window=window, window_depth=1)


def forward(window):
    model = network(window)

    def run(params, window_codes, label):
        cond = model.apply(
            {"params": params}, None, window_codes, label, method=Joint.teacher_forced
        )
        rows = model.apply({"params": params}, cond, method=Joint.slots)
        return model.apply({"params": params}, rows, method=Joint.logits)

    return jax.jit(run)


def init(window):
    model = network(window)
    boxed = functools.partial(model.init, method=Joint.touch_all)
    return lambda rng: nn.unbox(boxed(rng, jnp.zeros(1, int)))["params"]


def without_gain(params):
    return params | {
        name: params[name] | {"gain": jnp.zeros(WIDTH)}
        for name in ("window_encoder", "window_decoder")
    }


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(jax.eval_shape(init(3), jax.random.key(0)))


@pytest.fixture(scope="module")
def forward_3():
    return forward(3)


@pytest.fixture(scope="module")
def codes():
    return jax.random.randint(jax.random.key(3), (2, LENGTH), 0, NUM_CODES)


LABEL = jnp.array([0, 2])


def test_windows_end_in_pads():
    codes = jnp.array([[5, 6, 7, 8]])
    windows = tensorar.windows(codes, 3, pad=99)
    assert windows[0].tolist() == [[5, 6, 7], [6, 7, 8], [7, 8, 99], [8, 99, 99]]
    np.testing.assert_array_equal(tensorar.slot_mask(4, 3), windows[0] != 99)
    np.testing.assert_array_equal(tensorar.windows(codes, 1, pad=99), codes[..., None])


def test_masked_slots_are_pads():
    windows = tensorar.windows(jnp.array([[5, 6, 7, 8]]), 3, pad=99)
    masked = tensorar.mask_slots(windows, jnp.array([[1, 2, 3, 3]]), pad=99)
    assert masked[0].tolist() == [[5, 99, 99], [6, 7, 99], [7, 8, 99], [8, 99, 99]]


def test_noise_levels_grow_from_nothing_and_never_reach_one():
    # The printed values for windows of 4, to three digits.
    expected = {
        "linear": [0, 0.25, 0.5, 0.75],
        "sine": [0, 0.383, 0.707, 0.924],
        "sqrt": [0, 0.5, 0.707, 0.866],
        "exponential": [0, 0.165, 0.378, 0.650],
    }
    assert expected.keys() == tensorar.SCHEDULES.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(tensorar.noise_levels(name, 4), values, atol=5e-4)
        levels = tensorar.noise_levels(name, 16)
        assert levels[0] == 0 and np.all(np.diff(levels) > 0) and levels[-1] < 1


LEVELS = np.array([0.0, 0.4, 0.8], np.float32)
MANY = jax.random.randint(jax.random.key(4), (3000, 5), 0, NUM_CODES)
CODEBOOK = jax.random.normal(jax.random.key(5), (NUM_CODES, 3))
NOISES = {
    "categorical": lambda rng, nested: tensorar.categorical_noise(
        rng, MANY, levels=LEVELS, num_codes=NUM_CODES, nested=nested
    ),
    "codebook": lambda rng, nested: tensorar.codebook_noise(
        rng, MANY, levels=LEVELS, codebook=CODEBOOK, nested=nested
    ),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("noise", NOISES)
def test_noise_spares_the_first_slot_and_the_pads(noise, nested):
    clean = tensorar.windows(MANY, 3, pad=PAD)
    noised = NOISES[noise](jax.random.key(0), nested)
    np.testing.assert_array_equal(noised[..., 0], clean[..., 0])
    np.testing.assert_array_equal(noised == PAD, clean == PAD)
    changed = np.mean(noised != clean, axis=(0, 1))
    assert changed[0] == 0.0 < changed[1] < changed[2]
    assert np.any(noised != NOISES[noise](jax.random.key(1), nested))


@pytest.mark.parametrize("nested", [False, True])
def test_categorical_noise_flips_at_its_level(nested):
    noised = NOISES["categorical"](jax.random.key(0), nested)
    clean = tensorar.windows(MANY, 3, pad=PAD)
    for slot in (1, 2):
        flips = (noised != clean)[..., slot][clean[..., slot] != PAD]
        rate = LEVELS[slot] * (1 - 1 / NUM_CODES)
        assert abs(flips.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / flips.size)
    # What replaces a code is any code.
    new = np.asarray(noised[..., 2])[np.asarray(noised != clean)[..., 2]]
    share = np.bincount(new, minlength=NUM_CODES) / len(new)
    np.testing.assert_allclose(share, 1 / NUM_CODES, atol=5 / np.sqrt(NUM_CODES * len(new)))


def disagreements_along_tokens(noised):
    """How often a token flipped in one window shows another code in an earlier window.

    Slot j of window i and slot j + 1 of window i - 1 are about the same token.
    """
    clean = tensorar.windows(MANY, 3, pad=PAD)
    later, earlier = noised[:, 1:, :-1], noised[:, :-1, 1:]
    flipped = (later != clean[:, 1:, :-1]) & (later != PAD)
    return np.asarray(later != earlier)[np.asarray(flipped)].mean()


def test_nested_noise_tells_no_more_in_many_windows_than_in_one():
    assert disagreements_along_tokens(NOISES["categorical"](jax.random.key(0), True)) == 0.0
    assert disagreements_along_tokens(NOISES["categorical"](jax.random.key(0), False)) > 0.5


def test_codebook_noise_has_the_law_of_the_naive_argmax():
    table = np.asarray(CODEBOOK, np.float64)
    table /= np.linalg.norm(table, axis=-1, keepdims=True)
    noised = np.asarray(NOISES["codebook"](jax.random.key(0), False))
    clean = np.asarray(tensorar.windows(MANY, 3, pad=PAD))
    for slot in (1, 2):
        mixed = (1 - LEVELS[slot]) * table[:, None] + LEVELS[slot] * table[None]
        nearest = np.argmax(mixed @ table.T, axis=-1)  # by code and noise code
        for code in range(NUM_CODES):
            law = np.bincount(nearest[code], minlength=NUM_CODES) / NUM_CODES
            seen = noised[..., slot][clean[..., slot] == code]
            share = np.bincount(seen, minlength=NUM_CODES) / len(seen)
            assert np.all(np.abs(share - law) <= 5 * np.sqrt(law * (1 - law) / len(seen)) + 1e-9)


def test_codebook_noise_at_level_zero_is_the_identity():
    noised = tensorar.codebook_noise(
        jax.random.key(0), MANY, levels=np.zeros(3, np.float32), codebook=CODEBOOK
    )
    np.testing.assert_array_equal(noised, tensorar.windows(MANY, 3, pad=PAD))


def test_codebook_noise_does_not_depend_on_the_block():
    few = MANY[:50]
    small, large = (
        tensorar.codebook_noise(
            jax.random.key(0), few, levels=LEVELS, codebook=CODEBOOK, block_size=block_size
        )
        for block_size in (7, 2048)
    )
    np.testing.assert_array_equal(small, large)


def test_codebook_noise_on_signs_is_a_hard_switch():
    signs = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=3)))
    codes = MANY % len(signs)
    levels = np.array([0.0, 0.45, 0.55], np.float32)
    noised = tensorar.codebook_noise(jax.random.key(0), codes, levels=levels, codebook=signs)
    clean = tensorar.windows(codes, 3, pad=len(signs))
    np.testing.assert_array_equal(noised[..., 1], clean[..., 1])
    inside = np.asarray(clean[..., 2] != len(signs))
    flips = np.asarray(noised != clean)[..., 2][inside]
    rate = 1 - 1 / len(signs)  # every code is replaced by a uniform one
    assert abs(flips.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / flips.size)


def test_window_one_is_the_plain_model_and_has_no_window_parameters(codes):
    params = tiny.random_params(jax.eval_shape(init(1), jax.random.key(0)))
    assert not any("window" in name for name in params)
    logits = forward(1)(params, codes[..., None], LABEL)

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


def test_any_window_starts_as_the_plain_model(params, forward_3, codes):
    base = {name: value for name, value in params.items() if "window" not in name}
    # Without windows there is no pad.
    base["code_embed"] = {"table": params["code_embed"]["table"][:PAD]}
    expected = forward(1)(base, codes[..., None], LABEL)[..., 0, :]
    drafts = jax.random.randint(jax.random.key(6), (*codes.shape, 2), 0, NUM_CODES + 1)
    windows = jnp.concatenate([codes[..., None], drafts], axis=-1)
    np.testing.assert_array_equal(
        forward_3(without_gain(params), windows, LABEL)[..., 0, :], expected
    )
    assert np.max(np.abs(forward_3(params, windows, LABEL)[..., 0, :] - expected)) > 1e-2


def test_gains_are_zero_at_initialisation():
    @jax.jit
    def gains(rng):
        params = init(3)(rng)
        return params["window_encoder"]["gain"], params["window_decoder"]["gain"]

    for gain in gains(jax.random.key(0)):
        assert gain.shape == (WIDTH,) and not gain.any()


def test_windows_fed_in_reach_later_positions_only(params, forward_3, codes):
    # Tokens and noised windows as independent inputs: in training, noised copies of later codes
    # stand in earlier windows by design.
    windows = jax.random.randint(jax.random.key(7), (*codes.shape, 3), 0, NUM_CODES)
    plain = forward_3(params, windows, LABEL)
    for position in range(LENGTH - 1):
        for slot in range(3):
            other = windows.at[:, position, slot].set((windows[:, position, slot] + 1) % NUM_CODES)
            changed = np.abs(forward_3(params, other, LABEL) - plain).max(axis=(0, 2, 3))
            assert np.all(changed[: position + 1] == 0.0)
            assert np.all(changed[position + 1 :] > 1e-4)


@pytest.mark.parametrize("mlp_ratio", [0, 4])
def test_pruned_slots_have_the_values_of_the_whole_window(mlp_ratio):
    decoder = tensorar.OutputDecoder(2, num_heads=2, window=4, mlp_ratio=mlp_ratio)
    cond = jax.random.normal(jax.random.key(0), (5, WIDTH))
    shapes = nn.unbox(jax.eval_shape(decoder.init, jax.random.key(1), cond))["params"]
    params = tiny.random_params(shapes)
    decode = jax.jit(
        lambda num_slots: decoder.apply({"params": params}, cond, num_slots), static_argnums=0
    )
    whole = decode(None)
    assert whole.shape == (5, 4, WIDTH)
    np.testing.assert_allclose(decode(1), whole[:, :1], atol=1e-5)
    np.testing.assert_allclose(decode(3), whole[:, :3], atol=1e-5)


def count(module, x):
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_parameter_counts_are_the_published_ones():
    d, window = WIDTH, 4
    x, cond = jnp.zeros((1, window, d)), jnp.zeros((1, d))
    # arXiv v1: two blocks of 12 d^2 on each side. The rest: norms, positions or queries, the gain.
    assert count(tensorar.InputEncoder(2, 2, 4), x) == 24 * d**2 + 4 * d + (window + 1) * d + d
    assert count(tensorar.OutputDecoder(2, 2, window, 4), cond) == (
        24 * d**2 + 4 * d + window * d + d
    )
    # ICLR 2026: one attention layer of 4 d^2 on each side.
    assert count(tensorar.InputEncoder(1, 2, 0), x) == 4 * d**2 + d + (window + 1) * d + d
    assert count(tensorar.OutputDecoder(1, 2, window, 0), cond) == 4 * d**2 + d + window * d + d
