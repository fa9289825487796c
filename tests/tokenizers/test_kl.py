"""Laws of the KL tokenizer: token order, the posterior's draws, the scale, and its full size."""

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcond_jax import types
from arcond_jax.nn import conv
from arcond_jax.tokenizers import kl, law, paired, vq
from arcond_jax.tokenizers import network as network_lib

HEIGHT, WIDTH, CHANNELS, PATCH = 8, 16, 3, 2


def drawn(abstract):
    """Small random weights: to compile the network's own `init` takes seconds."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype), abstract
    )


@pytest.fixture(scope="module")
def tokenizer():
    network = kl.KLAutoencoder(
        width=32, multipliers=(1, 1), num_blocks=1, latent_channels=CHANNELS, attention_levels=(1,)
    )
    return drawn(
        kl.abstract(network, image_size=(HEIGHT, WIDTH), latent_scale=0.5, patch_size=PATCH)
    )


@pytest.fixture(scope="module")
def image():
    return jax.random.uniform(jax.random.key(1), (2, HEIGHT, WIDTH, 3), minval=-1.0)


encode = jax.jit(lambda tokenizer, image, rng=None: tokenizer.encode(image, rng))
decode = jax.jit(lambda tokenizer, tokens: tokenizer.decode(tokens))


def test_shapes_and_contract(tokenizer, image):
    tokens = encode(tokenizer, image)
    assert isinstance(tokenizer, types.Tokenizer)
    assert tokenizer.grid == (2, 4) and tokenizer.channels == CHANNELS * PATCH**2
    assert tokens.latents.shape == (2, 8, tokenizer.channels) and tokens.codes is None
    assert tokenizer.code_law is None
    assert decode(tokenizer, tokens).shape == image.shape


def test_decode_of_the_mode_is_the_networks_reconstruction(tokenizer, image):
    # The scale and the order of the features cancel.
    expected = jax.jit(tokenizer.network.apply)({"params": tokenizer.params}, image)
    decoded = decode(tokenizer, encode(tokenizer, image))
    np.testing.assert_allclose(decoded, expected, atol=1e-5 * np.abs(expected).max())


def test_token_order_is_raster_and_feature_order_is_channel_row_column():
    rows, columns, channels = jnp.meshgrid(*(jnp.arange(n) for n in (4, 6, 3)), indexing="ij")
    place = (100.0 * channels + 10 * rows + columns)[None]
    tokens = kl.cut(place, 2)
    assert tokens.shape == (1, 6, 12)
    # The fifth square begins at row 2, column 2.
    expected = [100 * c + 10 * p + q for c in range(3) for p in (2, 3) for q in (2, 3)]
    np.testing.assert_array_equal(tokens[0, 4], expected)
    np.testing.assert_array_equal(kl.paste(tokens, (2, 3), 2), place)


def test_paste_undoes_cut_for_every_patch_size():
    latents = jax.random.normal(jax.random.key(0), (2, 4, 8, 5))
    for p in (1, 2, 4):
        np.testing.assert_array_equal(kl.paste(kl.cut(latents, p), (4 // p, 8 // p), p), latents)


def test_draws_spread_around_the_mode(tokenizer, image):
    mode = encode(tokenizer, image).latents[0]
    copies = jnp.broadcast_to(image[0], (400, *image.shape[1:]))
    draws = np.asarray(encode(tokenizer, copies, jax.random.key(2)).latents)
    assert np.all(draws.std(axis=0) > 0)
    # 96 means over 400 draws: five standard errors are exceeded with a chance below 1e-4.
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert np.max(np.abs(draws.mean(axis=0) - mode) / error) < 5


def test_a_draw_follows_its_noise_and_the_log_variance_is_clamped():
    moments = jnp.concatenate([jnp.full((1, 1, 1, 2), 3.0), jnp.array([[[[-99.0, 0.0]]]])], -1)
    np.testing.assert_allclose(kl.std(moments)[0, 0, 0], [np.exp(-15.0), 1.0], rtol=1e-6)
    draw = kl.sample(moments, jnp.full((1, 1, 1, 2), 2.0))
    np.testing.assert_allclose(draw[0, 0, 0], [3.0, 5.0], rtol=1e-6)
    # Each term is (mean^2 + variance - 1 - log variance) / 2.
    expected = (9 + np.exp(-30.0) - 1 + 30 + 9) / 2
    np.testing.assert_allclose(kl.divergence(moments), [expected], rtol=1e-6)


def test_group_norm_is_that_of_its_definition():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 4, 6, 64))
    groups = np.asarray(x, np.float64).reshape(2, 4, 6, 32, 2)
    mean = groups.mean(axis=(1, 2, 4), keepdims=True)
    expected = (groups - mean) / np.sqrt(groups.var(axis=(1, 2, 4), keepdims=True) + 1e-6)
    y = conv.GroupNorm(use_affine=False).apply({}, x)
    np.testing.assert_allclose(y, expected.reshape(x.shape), atol=1e-5)


def test_bfloat16_stays_near_float32(tokenizer, image):
    half = tokenizer.replace(network=tokenizer.network.clone(dtype=jnp.bfloat16))
    tokens = encode(tokenizer, image)
    decoded, expected = decode(half, tokens), decode(tokenizer, tokens)
    assert decoded.dtype == jnp.float32
    # Ten convolutions, each rounding by 2^-9 of its values.
    np.testing.assert_allclose(decoded, expected, atol=0.05 * np.abs(expected).max())


def test_errors_say_what_to_do(tokenizer, image):
    with pytest.raises(ValueError, match=r"made for images of shape \(8, 16, 3\), got \(8, 8, 3\)"):
        tokenizer.encode(image[:, :, :8])
    with pytest.raises(ValueError, match="hold no latents"):
        tokenizer.decode(types.Tokens())
    with pytest.raises(ValueError, match=r"covers 32x32 pixels, which does not divide .* 240x256"):
        kl.abstract(kl.KLAutoencoder(), image_size=(240, 256), patch_size=2)


def test_full_size_has_as_many_parameters_as_the_official_model():
    abstract = kl.abstract(kl.KLAutoencoder(), image_size=(256, 256))
    # Counted in AutoencoderKL(embed_dim=16, ch_mult=(1, 1, 2, 2, 4)) of models/vae.py.
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 66_456_019
    assert abstract.grid == (16, 16) and abstract.channels == 16


@pytest.mark.slow
def test_full_size_decodes_an_image():
    tokenizer = drawn(kl.abstract(kl.KLAutoencoder(), image_size=(256, 256)))
    tokens = types.Tokens(latents=jax.random.normal(jax.random.key(0), (1, 256, 16)))
    jax.block_until_ready(decode(tokenizer, tokens))
    start = time.perf_counter()
    image = jax.block_until_ready(decode(tokenizer, tokens))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts kilobytes
    print(f"one image of 256x256 decoded in {seconds:.1f} s; {peak:.2f} GiB at the peak")
    assert image.shape == (1, 256, 256, 3) and np.all(np.isfinite(image))
    assert peak < 6  # GiB: a quarter of a small machine, parameters included


def pair_of(tokenizer):
    network = vq.VQAutoencoder(
        width=32, multipliers=(1, 1, 1), num_blocks=1, latent_channels=32, num_codes=16
    )
    codes = network_lib.abstract(network, image_size=(HEIGHT, WIDTH))
    return paired.abstract(tokenizer, drawn(codes), with_law=False)


@pytest.mark.long
def test_a_pair_gives_what_each_of_the_two_gives(tokenizer, image):
    pair, rng = pair_of(tokenizer), jax.random.key(3)
    assert isinstance(pair, types.Tokenizer) and pair.grid == (2, 4) and pair.code_law is None
    stored = jax.jit(lambda pair: pair.store(image))(pair)
    drawn_by_kl, tokens = tokenizer.tokens(stored, rng), pair.tokens(stored, rng)
    np.testing.assert_array_equal(tokens.latents, drawn_by_kl.latents)
    mode, expected = pair.tokens(stored).latents, encode(tokenizer, image).latents
    # Two programs for one network; these differ in the last bits.
    np.testing.assert_allclose(mode, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(tokens.codes, encode(pair.codes, image).codes)
    of_latents = types.Tokens(latents=tokens.latents)
    np.testing.assert_array_equal(decode(pair, tokens), decode(tokenizer, of_latents))
    of_codes = types.Tokens(codes=tokens.codes)
    np.testing.assert_array_equal(decode(pair, of_codes), decode(pair.codes, of_codes))
    with pytest.raises(ValueError, match="No moments are stored"):
        pair.tokens(types.Stored(codes=tokens.codes))


def test_a_pair_has_one_grid(tokenizer):
    codes = pair_of(tokenizer).codes
    network = codes.network.clone(multipliers=(1, 1))
    codes = codes.replace(network=network)
    with pytest.raises(ValueError, match="on a grid of 2x4 and codes on one of 4x8 are no pair"):
        paired.abstract(tokenizer, codes, with_law=True)


def labelled_latents(num_codes, counts, seed=0):
    """Latents around the means of their codes, each code with a covariance of its own."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(num_codes, CHANNELS))
    mixing = np.eye(CHANNELS) + 0.4 * rng.normal(size=(num_codes, CHANNELS, CHANNELS))
    codes = rng.permutation(np.repeat(np.arange(num_codes), counts))
    noise = np.einsum("nij,nj->ni", mixing[codes], rng.normal(size=(len(codes), CHANNELS)))
    return means[codes] + 0.7 * noise, codes


def test_the_law_of_codes_by_hand():
    counts = np.array([40, 3, 1, 0, 2000])
    x, codes = labelled_latents(5, counts)
    both = [law.sums(x[i], codes[i], num_codes=5) for i in (slice(100), slice(100, None))]
    found = law.statistics(both[0] + both[1])
    made = law.code_law(both[0] + both[1])

    c, n, k = CHANNELS, len(x), np.count_nonzero(counts)
    members = [x[codes == code] for code in range(5)]
    scatter = [(y - y.mean(0)).T @ (y - y.mean(0)) if len(y) else np.zeros((c, c)) for y in members]
    pooled = sum(scatter) / (n - k)
    share = np.trace(pooled) / np.trace(np.cov(x.T))
    assert found["latent scale"] == pytest.approx(1 / x.std())
    assert found["var(x | y) / var(x)"] == pytest.approx(share)
    strength = share / (1 - share)
    for code, (y, own) in enumerate(zip(members, scatter, strict=True)):
        size, mean = len(y), x.mean(0)
        away = y.mean(0) - mean if size else np.zeros(c)
        after = strength + size
        spread = c * pooled + own + strength * size / after * np.outer(away, away)
        covariance = spread / (c + size) * (1 + 1 / after)
        np.testing.assert_allclose(made.mean[code], mean + size / after * away, atol=1e-6)
        cholesky = np.asarray(made.cholesky[code], np.float64)
        np.testing.assert_allclose(cholesky @ cholesky.T, covariance, atol=1e-5)
        if size == 0:  # all that is known is what all latents are like
            assert np.trace(covariance) == pytest.approx(np.trace(np.cov(x.T)))
        if size == 2000:
            np.testing.assert_allclose(covariance, np.cov(y.T), rtol=0.02, atol=0.01)


def test_the_law_of_codes_foretells_latents_better_than_those_of_a_code_or_of_all():
    x, codes = labelled_latents(300, np.random.default_rng(1).geometric(0.1, 300))
    seen, held = np.arange(len(x)) % 2 == 0, np.arange(len(x)) % 2 == 1
    made = law.code_law(law.sums(x[seen], codes[seen], num_codes=300))
    pooled = law.code_law(law.sums(x[seen]))

    def surprise(mean, cholesky):
        """Mean negative log-likelihood, of what was not seen."""
        scaled = np.linalg.solve(cholesky, (x[held] - mean)[..., None])[..., 0]
        diagonal = np.diagonal(cholesky, axis1=-2, axis2=-1)
        return float(np.mean(0.5 * (scaled**2).sum(-1) + np.log(diagonal).sum(-1)))

    ours = surprise(np.asarray(made.mean)[codes[held]], np.asarray(made.cholesky)[codes[held]])
    assert ours < surprise(np.asarray(pooled.mean), np.asarray(pooled.cholesky)) - 0.3
    own = [x[seen & (codes == code)] for code in range(300)]
    known = np.array([len(y) > CHANNELS for y in own])[codes[held]]
    mean = np.array([y.mean(0) if len(y) else np.zeros(CHANNELS) for y in own])
    spread = [np.cov(y.T) if len(y) > CHANNELS else np.eye(CHANNELS) for y in own]
    raw = np.linalg.cholesky(np.array(spread))
    x, held = x[held][known], slice(None)
    codes = codes[np.arange(len(codes)) % 2 == 1][known]
    ours = surprise(np.asarray(made.mean)[codes], np.asarray(made.cholesky)[codes])
    assert ours < surprise(mean[codes], raw[codes]) - 0.1


def test_latents_that_are_a_draw_count_as_one_draw_each():
    """On average over draws, also where codes are rare, whose means follow their latents."""
    mean, codes = labelled_latents(200, 3)
    rng = np.random.default_rng(2)
    variance = rng.uniform(0.5, 1.5, mean.shape)
    found = law.statistics(law.sums(mean, codes, variance=variance, num_codes=200))
    draws = (mean + np.sqrt(variance) * rng.normal(size=mean.shape) for _ in range(100))
    drawn = [law.statistics(law.sums(x, codes, num_codes=200)) for x in draws]
    for name, value in found.items():  # a draw of 600 latents is off by 5 %, their mean by 0.5 %
        assert value == pytest.approx(np.mean([x[name] for x in drawn]), rel=0.01)


def test_a_law_needs_a_code_that_was_seen_twice():
    with pytest.raises(ValueError, match=r"3 latents are of as many codes, .*: take more images"):
        law.code_law(law.sums(np.eye(3), np.arange(3), num_codes=4))
