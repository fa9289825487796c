"""Attention by a kernel: the numbers of the einsum, and where which is taken."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from arcond_jax.models import gpt
from arcond_jax.nn import attention, kernels
from arcond_jax.parallel import collectives, compiled, operations
from arcond_jax.parallel import mesh as mesh_lib


def inputs(*, length, dtype, b=2, kv_heads=2, groups=2, k=8):
    """Queries, keys and values, and a cotangent of the result."""
    rngs = jax.random.split(jax.random.key(length), 4)
    heads = (kv_heads * groups, kv_heads, kv_heads, kv_heads * groups)
    shapes = [(b, length, h, k) for h in heads]
    return [jax.random.normal(r, s, dtype) for r, s in zip(rngs, shapes, strict=True)]


def splash(is_causal):
    def run(queries, keys, values):
        return kernels.splash(queries, keys, values, is_causal=is_causal, interpret=True)

    return run


def einsum(is_causal):
    return lambda *qkv: attention.attend(*qkv, is_causal=is_causal)


def with_gradient(function):
    """The result and, of a cotangent, the gradients."""

    def run(*args):
        result, pull = jax.vjp(function, *args[:3])
        return result, *pull(args[3])

    return run


@pytest.mark.parametrize(
    ("length", "is_causal", "dtype"),
    [
        (128, True, jnp.float32),
        (150, False, jnp.float32),
        (150, True, jnp.bfloat16),
        (128, False, jnp.bfloat16),
    ],
)
def test_splash_gives_the_numbers_of_the_einsum(length, is_causal, dtype):
    """Grouped heads, and lengths that it pads; the gradient too. Here Pallas interprets it."""
    given = inputs(length=length, dtype=dtype)
    exact = [x.astype(jnp.float32) for x in given]
    expected = jax.jit(with_gradient(einsum(is_causal)))(*exact)
    found = jax.jit(with_gradient(splash(is_causal)))(*given)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == dtype
        # bfloat16 has 8 bits: a few roundings of the largest number.
        tolerance = 2e-6 if dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(
            x.astype(jnp.float32), y, rtol=0, atol=tolerance * np.abs(y).max()
        )


def test_a_mesh_cuts_batch_and_heads_and_sends_nothing():
    mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
    given = inputs(length=128, dtype=jnp.float32, b=4)
    run = with_gradient(splash(is_causal=True))
    place = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    placed = jax.device_put(given, place)
    program = compiled.Compiled(run, mesh)
    made = program.lower(*placed).compile()
    assert collectives.of_program(made.as_text(), mesh) == []
    for x, y in zip(made(*placed), jax.jit(run)(*given), strict=True):
        assert x.sharding.spec == place.spec
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


SUITED = dict(num_queries=256, num_keys=256, head_dim=64, is_plain=True)


@pytest.mark.parametrize(
    ("platform", "dtype", "changes", "kind"),
    [
        ("tpu", "bfloat16", {}, "splash"),
        ("tpu", "bfloat16", dict(head_dim=80), "splash"),
        ("tpu", "bfloat16", dict(num_queries=320, num_keys=320), "splash"),
        ("tpu", "bfloat16", dict(num_queries=576, num_keys=576), "splash"),
        ("tpu", "bfloat16", dict(num_queries=257, num_keys=257), "einsum"),  # half of it padding
        ("tpu", "bfloat16", dict(num_queries=128, num_keys=128), "einsum"),
        ("tpu", "bfloat16", dict(num_queries=1), "einsum"),
        ("tpu", "bfloat16", dict(head_dim=512), "einsum"),
        ("tpu", "bfloat16", dict(is_plain=False), "einsum"),
        ("tpu", "float32", {}, "einsum"),
        ("cpu", "bfloat16", {}, "einsum"),
        (None, "bfloat16", {}, "einsum"),
        ("gpu", "bfloat16", {}, "cudnn"),
        ("gpu", "bfloat16", dict(num_queries=258, num_keys=258), "cudnn"),
        ("gpu", "bfloat16", dict(num_queries=257, num_keys=257), "einsum"),
        ("gpu", "bfloat16", dict(head_dim=100), "einsum"),
        ("gpu", "float32", {}, "einsum"),
    ],
)
def test_what_is_chosen(platform, dtype, changes, kind, monkeypatch):
    monkeypatch.setattr(kernels, "_has_cudnn", lambda: True)
    assert kernels.choose(platform, dtype, **SUITED | changes) == kind


def test_without_cudnn_a_gpu_computes_the_einsum():
    if jax.default_backend() != "gpu":
        assert kernels.choose("gpu", "bfloat16", **SUITED) == "einsum"


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_program_for_gpus_calls_cudnn_for_result_and_gradient(is_causal, monkeypatch):
    """Lowered for CUDA without a card; of that the versions alone are made up."""
    monkeypatch.setattr(kernels, "_has_cudnn", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform="gpu")
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh((2, 1, 1), mesh_lib.AXES, kinds, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        run = jax.jit(with_gradient(einsum(is_causal)))
        traced = run.trace(*inputs(length=256, dtype=jnp.bfloat16, b=4))
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert sorted(re.findall(r"@__cudnn\$(\w+)", program)) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    assert "tensor<2x256x4x8xbf16>" in program  # each device its half of the batch
    assert "256x256" not in program  # and no scores


NETWORK = gpt.GPT(
    depth=1,
    width=16,
    num_heads=2,
    grid=(16, 16),
    num_prefix=0,
    mlp_hidden=8,
    remat="full",
    dtype=jnp.bfloat16,
)


def traced(network, *, platform, b=4, **options):
    """The gradient of a network, on two devices of a platform that need not be here."""
    device = platform and jax.sharding.AbstractDevice(
        device_kind="any", num_cores=None, platform=platform
    )
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh((2, 1, 1), mesh_lib.AXES, kinds, abstract_device=device)
    x = jnp.zeros((b, 256, 16), jnp.bfloat16)
    params = jax.eval_shape(network.init, jax.random.key(0), x, None)["params"]

    def loss(params, x):
        y, _ = network.apply({"params": params}, x, None, **options)
        return y.astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.make_jaxpr(jax.grad(loss, argnums=1))(jax.tree.map(jnp.zeros_like, params), x)


def kinds_of(program):
    names = [str(x.source_info.name_stack) for x in operations.equations(program.jaxpr)]
    return {kind for name in names for kind, *_ in attention.SCOPE.findall(name)}


def test_the_platform_of_the_mesh_decides_and_operations_are_counted_in_kernels():
    on_tpu, anywhere = traced(NETWORK, platform="tpu"), traced(NETWORK, platform=None)
    assert (kinds_of(on_tpu), kinds_of(anywhere)) == ({"splash"}, {"einsum"})
    # For the gradient a kernel computes the scores again, and products of results and cotangents.
    more = 2 * 4 * 2 * 256 * (256 + 1) * 8
    assert operations.count(on_tpu) == operations.count(anywhere) + more


def test_dropped_weights_need_the_einsum():
    dropping = NETWORK.clone(attention_dropout=0.1)
    options = dict(rngs={"dropout": jax.random.key(0)})
    assert kinds_of(traced(dropping, platform="tpu", **options)) == {"einsum"}
    assert kinds_of(traced(dropping, platform="tpu")) == {"splash"}
