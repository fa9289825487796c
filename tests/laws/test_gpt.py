"""The causal stack: what may see what, and the ways of running it that must not change it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcond_jax.models import gpt
from arcond_jax.nn import rope, stack

SETTINGS = dict(depth=2, width=32, num_heads=4, grid=(2, 3), mlp_hidden=48)
LENGTH = 7  # the class and six tokens


@pytest.fixture(scope="module")
def tokens():
    return jax.random.normal(jax.random.key(1), (2, LENGTH, SETTINGS["width"]))


def init(network, tokens):
    """Weights large enough for attention to be far from uniform."""
    params = nn.unbox(jax.jit(network.init)(jax.random.key(0), tokens))["params"]
    return jax.tree.map(lambda x: 5.0 * x if x.ndim > 2 else x, params)


@pytest.fixture(scope="module")
def params(tokens):
    return init(gpt.GPT(**SETTINGS), tokens)


def run(network):
    return jax.jit(lambda params, x, cache: network.apply({"params": params}, x, cache))


@pytest.fixture(scope="module")
def expected(params, tokens):
    return run(gpt.GPT(**SETTINGS))(params, tokens, None)[0]


def test_every_position_sees_itself_and_the_past_and_nothing_else(params, tokens):
    network = gpt.GPT(**SETTINGS)
    direction = jax.random.normal(jax.random.key(2), (SETTINGS["width"],))

    def outputs(x):
        return network.apply({"params": params}, x[None])[0][0] @ direction

    gradient = np.abs(jax.jit(jax.jacrev(outputs))(tokens[0])).max(-1)
    assert np.all(gradient[np.triu_indices(LENGTH, 1)] == 0.0)
    assert np.all(gradient[np.tril_indices(LENGTH)] > 1e-4)


def test_cached_equals_uncached_in_chunks_of_any_size(tokens):
    network = gpt.GPT(**SETTINGS, qk_norm=True, num_kv_heads=2)
    params, step = init(network, tokens), run(network)
    whole, none = step(params, tokens, None)
    assert none is None
    cache, parts, start = network.empty_cache(len(tokens)), [], 0
    for size in (1, 1, 4, 1):
        out, cache = step(params, tokens[:, start : start + size], cache)
        parts.append(out)
        start += size
    assert cache.index == LENGTH
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)


def test_hidden_places_are_seen_by_themselves_alone(params, tokens):
    network, hidden = gpt.GPT(**SETTINGS), jnp.array([[True, False], [True, True]])
    visible = jnp.pad(~hidden, ((0, 0), (0, LENGTH - 2)), constant_values=True)
    step = jax.jit(lambda x, cache: network.apply({"params": params}, x, cache, visible))
    whole = step(tokens, None)[0]
    other = step(jnp.where(visible[..., None], tokens, 1.0), None)[0]
    np.testing.assert_array_equal(other[visible], whole[visible])
    assert np.all(np.abs(other - whole)[~visible].max(-1) > 1e-2)
    first, cache = step(tokens[:, :4], network.empty_cache(len(tokens)))
    cached = jnp.concatenate([first, step(tokens[:, 4:], cache)[0]], axis=1)
    np.testing.assert_allclose(cached, whole, atol=2e-5)


def test_unrolled_layers_have_the_same_parameters_and_values(params, tokens, expected):
    network = gpt.GPT(**SETTINGS, unroll=SETTINGS["depth"])
    shapes = nn.unbox(jax.eval_shape(network.init, jax.random.key(0), tokens))["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(run(network)(params, tokens, None)[0], expected, atol=1e-5)


@pytest.mark.long
def test_recomputed_layers_give_the_same_value_and_gradient(params, tokens):
    results = []
    rngs = {"dropout": jax.random.key(3)}  # what is dropped must be drawn again alike
    for remat in stack.REMAT:
        network = gpt.GPT(**SETTINGS, remat=remat, dropout=0.1, attention_dropout=0.1)

        def loss(params, network=network):
            return jnp.mean(network.apply({"params": params}, tokens, rngs=rngs)[0] ** 2)

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(results[0][1])) > 1e-2
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), results[0], other
        )


@pytest.fixture(scope="module")
def dropped(tokens):
    """What the layers add to the tokens, for 16 draws of dropout at a rate of 3/4."""
    network = gpt.GPT(**SETTINGS, dropout=0.75)

    @jax.jit
    def run(params):
        def draw(rng):
            return network.apply({"params": params}, tokens, rngs={"dropout": rng})[0] - tokens

        return jax.vmap(draw)(jax.random.split(jax.random.key(4), 16))

    return run


def scaled_kernels(params, *, out=(1.0, 1.0), mlp=(1.0, 1.0)):
    """The last matrix of attention and of SwiGLU, in each layer, times a number."""

    def scale(branch, factors):
        return branch | {"kernel": branch["kernel"] * jnp.array(factors)[:, None, None]}

    blocks = params["blocks"]
    last = scale(blocks["mlp"]["Linear_1"], mlp)
    changed = {"out": scale(blocks["out"], out), "mlp": blocks["mlp"] | {"Linear_1": last}}
    return {"blocks": blocks | changed}


@pytest.mark.parametrize("silent", ["out", "mlp"])
def test_dropout_scales_what_it_keeps_of_a_branch(params, tokens, dropped, silent):
    one_branch = scaled_kernels(
        params, **{"out": (1.0, 0.0), "mlp": (1.0, 0.0), silent: (0.0, 0.0)}
    )
    plain = run(gpt.GPT(**SETTINGS))(one_branch, tokens, None)[0] - tokens
    added = np.asarray(dropped(one_branch))
    kept = added != 0.0
    expected = np.broadcast_to(4.0 * plain, added.shape)[kept]
    np.testing.assert_allclose(added[kept], expected, atol=1e-4)
    assert abs(kept.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / kept.size)


def test_dropout_is_drawn_anew_for_each_branch_and_layer(params, dropped):
    # An element is left as it was where two branches of two layers all drop it.
    share, rate = (np.asarray(dropped(params)) == 0.0), 0.75**4
    assert abs(share.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / share.size)


def test_attention_dropout_drops_whole_weights_and_keeps_the_mean(params, tokens):
    rate, num_draws = 0.5, 1024
    network = gpt.GPT(**SETTINGS, attention_dropout=rate)
    width, num_heads = SETTINGS["width"], SETTINGS["num_heads"]
    first = scaled_kernels(params, mlp=(0.0, 0.0))["blocks"]
    # One layer that shows the mixed values as they are.
    kernel = jnp.stack([jnp.eye(width), jnp.zeros((width, width))])
    params = {"blocks": first | {"out": {"kernel": kernel}}}
    plain = run(gpt.GPT(**SETTINGS))(params, tokens, None)[0] - tokens

    @jax.jit
    def draws(params):
        def draw(rng):
            return network.apply({"params": params}, tokens, rngs={"dropout": rng})[0] - tokens

        return jax.vmap(draw)(jax.random.split(jax.random.key(4), num_draws))

    added = np.asarray(draws(params))
    error = np.abs(added.mean(0) - plain) / (added.std(0) / np.sqrt(num_draws))
    assert error.max() < 5.0  # standard errors, of 448 numbers
    # The first position has one weight in each head: there or not.
    heads = added[:, :, 0].reshape(num_draws, 2, num_heads, -1)
    there = np.any(heads != 0.0, axis=-1, keepdims=True)
    expected = plain[:, 0].reshape(2, num_heads, -1) / (1.0 - rate)
    np.testing.assert_allclose(heads, np.where(there, expected, 0.0), atol=1e-5)
    assert abs(there.mean() - rate) < 4 * np.sqrt(rate * (1.0 - rate) / there.size)


def test_dropout_is_off_without_its_rng_or_at_a_rate_of_zero(params, tokens):
    def program(rngs, **rates):
        network = gpt.GPT(**SETTINGS, **rates)

        def forward(params):
            return network.apply({"params": params}, tokens, rngs=rngs)[0]

        return jax.jit(forward).lower(params).as_text()

    rates, rngs = dict(dropout=0.1, attention_dropout=0.1), {"dropout": jax.random.key(0)}
    plain = program({})
    assert program({}, **rates) == plain == program(rngs)
    assert program(rngs, **rates) != plain


def test_grouped_queries_equal_repeated_keys_and_values(tokens):
    num_kv_heads, groups = 2, 2
    grouped = gpt.GPT(**SETTINGS, num_kv_heads=num_kv_heads)
    params = init(grouped, tokens)
    kernel = params["blocks"]["qkv"]["kernel"]  # depth, width, kv head, queries + 2, head dim
    repeated = [
        kernel[:, :, head // groups, jnp.array([head % groups, groups, groups + 1])]
        for head in range(SETTINGS["num_heads"])
    ]
    blocks = params["blocks"] | {"qkv": {"kernel": jnp.stack(repeated, axis=2)}}
    full = run(gpt.GPT(**SETTINGS))({"blocks": blocks}, tokens, None)[0]
    np.testing.assert_allclose(run(grouped)(params, tokens, None)[0], full, atol=1e-5)


def test_bfloat16_stays_near_float32(params, tokens, expected):
    out = run(gpt.GPT(**SETTINGS, dtype=jnp.bfloat16))(params, tokens, None)[0]
    assert out.dtype == jnp.bfloat16
    error = np.linalg.norm(out.astype(jnp.float32) - expected) / np.linalg.norm(expected)
    assert 0.0 < error < 0.03


def test_normalised_queries_and_keys_forget_the_scale_of_their_weights(tokens):
    network = gpt.GPT(**SETTINGS, qk_norm=True)
    params, step = init(network, tokens), run(network)
    plain = step(params, tokens, None)[0]

    def change(*scales):
        kernel = params["blocks"]["qkv"]["kernel"] * jnp.array(scales)[:, None]
        scaled = params["blocks"] | {"qkv": {"kernel": kernel}}
        return float(jnp.max(jnp.abs(step({"blocks": scaled}, tokens, None)[0] - plain)))

    assert change(4.0, 4.0, 1.0) < 1e-3
    assert change(1.0, 1.0, 4.0) > 0.1  # values are not normalised


def test_rotated_scores_depend_on_the_offset_in_the_grid_alone():
    height, width, head_dim = 3, 4, 8
    table = rope.rope_table((height, width), head_dim, num_prefix=1)
    query, key = jax.random.normal(jax.random.key(0), (2, head_dim))

    def rotated(x):
        x = jnp.broadcast_to(x, (1, 1 + height * width, 1, head_dim))
        return np.asarray(rope.rotate(x, jnp.asarray(table)))[0, :, 0]

    queries, keys = rotated(query), rotated(key)
    # The class token is blotted out, not left as it is.
    assert not queries[0].any() and not keys[0].any()
    scores = queries[1:] @ keys[1:].T
    by_offset = {}
    for i in range(height * width):
        for j in range(height * width):
            offset = (i // width - j // width, i % width - j % width)
            by_offset.setdefault(offset, []).append(scores[i, j])
    np.testing.assert_allclose(
        [max(x) for x in by_offset.values()], [min(x) for x in by_offset.values()], atol=1e-5
    )
    assert np.ptp([x[0] for x in by_offset.values()]) > 0.1


def test_rope_needs_four_features_at_a_time():
    with pytest.raises(ValueError, match="divisible by 4"):
        rope.rope_table((2, 2), 6, num_prefix=1)
