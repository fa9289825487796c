"""Parameters laid out for a loop: other trees, the same values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import export

from arcond_jax.models import gpt
from arcond_jax.nn import layout, linear
from arcond_jax.parallel import compiled
from arcond_jax.parallel import mesh as mesh_lib

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


def kernel_read(num_rows=1):
    """A function to be traced, and the name of the kernel that its program then reads."""
    names = []

    def run(kernel):
        names.extend(layout.for_rows({"head": {"kernel": kernel}}, num_rows)["head"])
        return kernel

    return run, names


def abstract_mesh(device):
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=axes, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    ("platform", "name"), [("cpu", "turned_kernel"), ("tpu", "kernel"), ("gpu", "kernel")]
)
def test_kernels_lie_as_suits_the_platform_that_a_program_is_for(platform, name):
    """Not the machine it is compiled on ahead of time, which here is a CPU."""
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    run, names = kernel_read()
    with abstract_mesh(device):
        jax.make_jaxpr(run)(jnp.zeros((4, 6)))
    assert names == [name]


def test_kernels_stay_in_a_program_for_any_platform():
    run, names = kernel_read()
    with abstract_mesh(None):
        jax.make_jaxpr(run)(jnp.zeros((4, 6)))
    assert names == ["kernel"]


@pytest.mark.usefixtures("sizes_unchecked")
def test_kernels_stay_in_a_program_for_any_number_of_rows():
    run, names = kernel_read(export.symbolic_shape("b")[0])
    jax.make_jaxpr(run)(jnp.zeros((4, 6)))
    assert names == ["kernel"]


def test_kernels_are_turned_on_a_mesh_of_cpus():
    run, names = kernel_read()
    compiled.Compiled(run, mesh_lib.make_mesh()).trace(jnp.zeros((4, 6)))
    assert names == ["turned_kernel"]


def test_weights_rounded_beforehand_change_nothing():
    network = gpt.GPT(**SETTINGS, dtype=jnp.bfloat16)
    params = tiny.random_params(jax.eval_shape(network.init, jax.random.key(0), X, None)["params"])
    rounded = layout.rounded(params, jnp.bfloat16)
    types = {leaf.dtype for leaf in jax.tree.leaves(rounded["blocks"]["qkv"])}
    assert types == {jnp.dtype(jnp.bfloat16)}

    @jax.jit
    def run(params):
        return network.apply({"params": params}, X, None)[0]

    np.testing.assert_array_equal(*(np.asarray(run(x), np.float32) for x in (rounded, params)))
