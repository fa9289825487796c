"""Laws of the patch tokenizer: nothing is lost, the nearest code wins, codes carry a Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcond_jax import types
from arcond_jax.tokenizers import patches


@pytest.fixture(scope="module")
def image():
    # One row of pixels never changes, as the border of real images may.
    image = np.random.default_rng(0).uniform(-1, 1, (40, 4, 6, 3)).astype(np.float32)
    image[:, 0::2] = -1.0
    return image


@pytest.fixture(scope="module")
def tokenizer(image):
    return patches.fit(image, patch_size=2, num_codes=7, seed=0)


@pytest.fixture(scope="module")
def tokens(tokenizer, image):
    return tokenizer.encode(jnp.asarray(image))


def test_decode_of_latents_is_the_image(tokenizer, tokens, image):
    assert tokens.latents.shape == (40, 6, 12) and tokens.codes.shape == (40, 6)
    decoded = tokenizer.decode(types.Tokens(latents=tokens.latents))
    np.testing.assert_allclose(decoded, image, atol=1e-6)


def test_pixel_order(tokenizer):
    # Each pixel holds its own place; the second patch is the square right of the first.
    pixel = jnp.arange(4 * 6 * 3, dtype=jnp.float32).reshape(1, 4, 6, 3)
    latents = tokenizer.encode(pixel).latents * tokenizer.std + tokenizer.mean
    expected = np.asarray(pixel)[0, 0:2, 2:4].reshape(-1)
    np.testing.assert_allclose(latents[0, 1], expected, atol=1e-4)


def test_latents_are_standardised(tokens):
    latents = np.asarray(tokens.latents).reshape(-1, 12)
    np.testing.assert_allclose(latents.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(latents[:, 6:].std(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(latents[:, :6], 0)  # constant channels


def test_codes_are_nearest_and_ties_go_low(tokenizer, tokens):
    latents, codebook = np.asarray(tokens.latents, np.float64), np.asarray(tokenizer.codebook)
    distance = np.sum((latents[:, :, None] - codebook) ** 2, axis=-1)
    np.testing.assert_array_equal(tokens.codes, distance.argmin(axis=-1))
    twins = tokenizer.replace(codebook=tokenizer.codebook.at[5].set(tokenizer.codebook[2]))
    codes = twins.encode(twins.decode(types.Tokens(codes=jnp.full((1, 6), 5)))).codes
    np.testing.assert_array_equal(codes, 2)


def test_codes_survive_the_round_trip(tokenizer):
    codes = jnp.arange(6)[None]
    decoded = tokenizer.decode(types.Tokens(codes=codes))
    np.testing.assert_array_equal(tokenizer.encode(decoded).codes, codes)


def test_a_code_that_does_not_exist_shows_as_nan(tokenizer):
    decoded = np.asarray(tokenizer.decode(types.Tokens(codes=jnp.array([[7, 6, 0, 0, 0, 0]]))))
    is_nan = np.isnan(decoded)
    assert is_nan[:, :2, :2].all() and is_nan.sum() == 12


def test_code_gaussians_match_their_members(tokenizer, tokens):
    code = int(np.bincount(np.asarray(tokens.codes).ravel()).argmax())
    members = np.asarray(tokens.latents)[np.asarray(tokens.codes) == code]
    np.testing.assert_allclose(tokenizer.code_mean[code], members.mean(axis=0), atol=1e-5)
    cholesky = np.asarray(tokenizer.code_cholesky[code], np.float64)
    expected = np.cov(members.T, bias=True) + 1e-6 * np.eye(12)
    np.testing.assert_allclose(cholesky @ cholesky.T, expected, atol=1e-5)


def test_fit_is_deterministic_and_abstract_agrees(tokenizer, image):
    again = patches.fit(image, patch_size=2, num_codes=7, seed=0)
    jax.tree.map(np.testing.assert_array_equal, again, tokenizer)
    expected = patches.abstract((4, 6, 3), patch_size=2, num_codes=7)
    assert jax.tree.structure(expected) == jax.tree.structure(tokenizer)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), jax.tree.leaves(tokenizer))
    assert shapes == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(expected)]


def test_without_codes_the_latents_are_the_same(tokenizer, tokens, image):
    pixels = patches.fit(image, patch_size=2, num_codes=None, seed=0)
    assert pixels.code_law is None
    alone = pixels.encode(jnp.asarray(image))
    np.testing.assert_array_equal(alone.latents, tokens.latents)
    assert alone.codes is None
    np.testing.assert_array_equal(pixels.decode(tokens), tokenizer.decode(tokens))
    expected = patches.abstract((4, 6, 3), patch_size=2, num_codes=None)
    assert jax.tree.structure(expected) == jax.tree.structure(pixels)
    with pytest.raises(ValueError, match="no latents, and no codes of this tokenizer"):
        pixels.decode(types.Tokens(codes=tokens.codes))


def test_errors_say_what_to_do(tokenizer, image):
    with pytest.raises(ValueError, match="patch_size 4 does not divide images of 4x6"):
        patches.fit(image, patch_size=4, num_codes=2, seed=0)
    half = np.where(np.arange(6)[:, None] < 2, -1.0, 1.0) * np.ones((1, 4, 6, 3))
    with pytest.raises(ValueError, match="num_codes 3 is more than the 2 different patches"):
        patches.fit(half, patch_size=2, num_codes=3, seed=0)
    with pytest.raises(ValueError, match="fitted to images of shape"):
        tokenizer.encode(jnp.zeros((1, 8, 8, 1)))
    with pytest.raises(ValueError, match="no latents, and no codes of this tokenizer"):
        tokenizer.decode(types.Tokens())
