"""Laws of the KL tokenizer: token order, the posterior's draws, the scale, and its full size."""

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcond_jax import types
from arcond_jax.nn import conv
from arcond_jax.tokenizers import kl

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
