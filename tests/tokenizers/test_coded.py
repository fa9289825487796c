"""Laws of the tokenizers with codes: one contract for all, the sizes of the official models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcond_jax import types
from arcond_jax.nn import codebook, conv
from arcond_jax.nn import factors as factors_lib
from arcond_jax.tokenizers import lfq, maskgit_vq, network, vq

pytestmark = pytest.mark.slow  # minutes of compilation; tests/parity holds the arithmetic

HEIGHT, WIDTH = 8, 16
SMALL = dict(width=32, multipliers=(1, 2), num_blocks=1)
NETWORKS = {
    "vq": vq.VQAutoencoder(**SMALL, latent_channels=32, num_codes=16, code_width=4),
    "maskgit_vq": maskgit_vq.MaskGITAutoencoder(**SMALL, num_codes=16, code_width=32),
    "lfq": lfq.LFQAutoencoder(**SMALL, num_bits=4),
}


@pytest.fixture(scope="module", params=NETWORKS)
def tokenizer(request):
    abstract = network.abstract(NETWORKS[request.param], image_size=(HEIGHT, WIDTH))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype), abstract
    )


encode = jax.jit(lambda tokenizer, image: tokenizer.encode(image))
decode = jax.jit(lambda tokenizer, tokens: tokenizer.decode(tokens))


@jax.jit
def by_network(tokenizer, image):
    variables = {"params": tokenizer.params}
    codes = tokenizer.network.apply(variables, image, method="to_codes")
    return codes, tokenizer.network.apply(variables, codes, method="from_codes")


def test_contract(tokenizer):
    image = jax.random.uniform(jax.random.key(1), (2, HEIGHT, WIDTH, 3), minval=-1.0)
    tokens = encode(tokenizer, image)
    assert isinstance(tokenizer, types.Tokenizer) and isinstance(
        tokenizer.network, network.CodeNetwork
    )
    assert tokenizer.grid == (4, 8) and tokenizer.code_law is None
    assert tokens.codes.shape == (2, 32) and tokens.latents is None
    assert tokens.codes.min() >= 0 and tokens.codes.max() < tokenizer.network.num_codes
    decoded = decode(tokenizer, tokens)
    assert decoded.shape == image.shape and decoded.dtype == jnp.float32
    grid, expected = by_network(tokenizer, image)
    np.testing.assert_array_equal(tokens.codes, np.reshape(grid, (2, 32)))  # raster order
    np.testing.assert_allclose(decoded, expected, atol=1e-5 * np.abs(expected).max())


def test_errors_say_what_to_do(tokenizer):
    with pytest.raises(ValueError, match=r"made for images of shape \(8, 16, 3\), got \(8, 8, 3\)"):
        tokenizer.encode(jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="hold no codes"):
        tokenizer.decode(types.Tokens())
    with pytest.raises(ValueError, match="covers 2x2 pixels, which does not divide images of 7x8"):
        network.abstract(tokenizer.network, image_size=(7, 8))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        # Counted in the official PyTorch modules at their published sizes.
        (vq.VQAutoencoder(**vq.SIZES["VQ-16"]), 71_883_403),
        (vq.VQAutoencoder(**vq.SIZES["VQ-8"]), 70_109_835),
        (maskgit_vq.MaskGITAutoencoder(), 54_515_587),
        (lfq.LFQAutoencoder(**lfq.SIZES["256"]), 115_127_829),
        (lfq.LFQAutoencoder(**lfq.SIZES["128"]), 112_021_653),
    ],
    ids=["VQ-16", "VQ-8", "MaskGIT-VQGAN", "LFQ-256", "LFQ-128"],
)
def test_full_sizes_have_as_many_parameters_as_the_official_models(made, expected):
    params = network.abstract_params(made, (16, 16))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_nearest_code_ties_and_unit_length():
    table = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [8.0, 8.0]])
    params = {"params": {"table": table}}
    plain, unit = codebook.Codebook(4, 2), codebook.Codebook(4, 2, unit_length=True)
    latents = jnp.array([[[3.0, 0.0], [0.0, 0.5], [2.0, 2.0]]])
    np.testing.assert_array_equal(plain.apply(params, latents, method="nearest"), [[0, 0, 1]])
    np.testing.assert_array_equal(unit.apply(params, latents, method="nearest"), [[0, 1, 3]])
    distances = plain.apply(params, latents, method="distances")
    np.testing.assert_allclose(distances[0, 0], [4, 13, 4, 89], rtol=1e-6)
    vectors = unit.apply(params, jnp.array([1, 3, 4]), method="lookup")
    np.testing.assert_allclose(vectors[:2], [[0, 1], [0.5**0.5, 0.5**0.5]], rtol=1e-6)
    assert np.isnan(vectors[2]).all()


def test_bits_and_codes_are_inverse_and_zero_is_negative():
    codes = jnp.arange(64).reshape(2, 32)
    signs = lfq.to_signs(codes, 6)
    np.testing.assert_array_equal(signs[0, 5], [1, -1, 1, -1, -1, -1])  # 5 = 1 + 4
    np.testing.assert_array_equal(lfq.from_signs(signs), codes)
    np.testing.assert_array_equal(lfq.from_signs(jnp.array([[0.0, 1e-9, -1e-9]])), [2])


def test_factors_and_codes_are_inverse():
    codes = jax.random.randint(jax.random.key(0), (3, 50), 0, 2**18)
    sizes = (2**6, 2**12)
    factors = factors_lib.split(codes, sizes)
    assert factors.shape == (3, 50, 2)
    assert factors[..., 0].max() < 2**6 and factors[..., 1].max() < 2**12
    np.testing.assert_array_equal(factors_lib.join(factors, sizes), codes)
    # The first factor is made of the first channels.
    signs = lfq.to_signs(codes, 18)
    np.testing.assert_array_equal(lfq.from_signs(signs[..., :6]), factors[..., 0])


def test_doubling_by_nearest_and_by_depth():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    doubled = conv.double_nearest(x)[0, :, :, 0]
    np.testing.assert_array_equal(doubled, np.kron([[0, 1], [2, 3]], np.ones((2, 2))))
    # One pixel of eight channels: two channels in each corner, row by row.
    corners = conv.depth_to_space(jnp.arange(8.0).reshape(1, 1, 1, 8))
    np.testing.assert_array_equal(corners[0], [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])


def test_a_width_that_falls_into_no_groups_is_refused():
    narrow = vq.VQAutoencoder(width=8, multipliers=(1, 1), num_codes=16)
    with pytest.raises(ValueError, match="8 channels do not fall into 32 groups"):
        network.abstract(narrow, image_size=(8, 8))
