"""Parameters laid out for a loop: other trees, the same values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from arcond_jax.models import gpt
from arcond_jax.nn import layout, linear

SETTINGS = dict(depth=3, width=16, num_heads=2, grid=(2, 2), mlp_hidden=24)
X = jax.random.normal(jax.random.key(0), (2, 5, 16))


@pytest.mark.parametrize("features", [(6,), (3, 2, 4)])
def test_a_turned_kernel_is_the_same_map(features):
    module = linear.Linear(features, (None,) * (len(features) + 1), use_bias=True)
    params = tiny.random_params(jax.eval_shape(module.init, jax.random.key(0), X)["params"])
    turned = layout.turned(params)
    assert turned["turned_kernel"].shape == (*features, 16)
    result = module.apply({"params": turned}, X)
    assert result.shape == (2, 5, *features)
    np.testing.assert_allclose(result, module.apply({"params": params}, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unroll", [1, 3])
def test_a_stack_is_laid_out_layer_by_layer(unroll):
    network = gpt.GPT(**SETTINGS, unroll=unroll)
    params = tiny.random_params(jax.eval_shape(network.init, jax.random.key(0), X, None)["params"])
    laid_out = layout.apart(layout.turned(params))
    assert all(len(x) == 3 for x in laid_out["blocks"]["qkv"].values())

    @jax.jit
    def run(laid_out):
        return network.apply({"params": layout.together(laid_out)}, X, None)[0]

    plain = network.apply({"params": params}, X, None)[0]
    np.testing.assert_allclose(run(laid_out), plain, rtol=1e-5, atol=1e-6)


def test_kernels_are_turned_for_few_rows_alone():
    params = {"head": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}}
    assert layout.for_rows(params, layout.FEW_ROWS + 1) is params
    few = layout.for_rows(params, layout.FEW_ROWS)
    assert jax.tree.map(jnp.shape, few) == {"head": {"turned_kernel": (6, 4), "bias": (6,)}}
