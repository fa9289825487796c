"""What the TPU's own compiler makes of updates and samplers, without a TPU.

`make tpu` runs these. Small versions take a few minutes each on two cores; full sizes, marked slow
as well, up to half an hour.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from arcond_jax import aot, build
from arcond_jax.nn import attention
from arcond_jax.parallel import compiled, topology
from arcond_jax.parallel import mesh as mesh_lib

pytestmark = pytest.mark.tpu

pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'arcond_jax[tpu]'")

CACHE = "data.name=cache"
TRUNK = ("model.depth=2", "model.width=320", "model.num_heads=5")
HEAD = ("diffusion_head.depth=2", "diffusion_head.width=320")
MAR = (
    "model.encoder_depth=2",
    "model.decoder_depth=3",
    "model.encoder_width=320",
    "model.decoder_width=320",
    "model.encoder_num_heads=5",
    "model.decoder_num_heads=5",
)
SMALL = {
    "ar_xl_imagenet256": (CACHE, *TRUNK, *HEAD),
    "joint_xl_imagenet256:joint_tensorar": (CACHE, *TRUNK, *HEAD),
    "mar_huge_imagenet256": (CACHE, *MAR, *HEAD),
    "cdm_xl_imagenet256": (CACHE, *TRUNK),
    "rar_xl": (*TRUNK, "model.mlp_hidden=1280"),
    "llamagen_xl_256:tensorar_v1": TRUNK,
}
CHIPS = 4
PADDED = 1.25  # a chip's 80 rows of a gradient are padded to 96 before they are summed


def moved(report):
    return sum(x.bytes * x.times for x in report.collectives)


def num_params(config):
    return sum(x.size for x in jax.tree.leaves(nn.unbox(build.abstract_params(config))))


def largest_weight(config):
    """Its numbers; of one block, where the blocks of a trunk are stacked."""
    boxed = build.abstract_params(config)
    weights = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    return max(x.value.size // (x.value.shape[0] if "layers" in x.names else 1) for x in weights)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_update_moves_its_weights_and_no_activations(name):
    rows = 23  # of a chip, unlike any other size
    settings = (*SMALL[name], f"data.batch_size={CHIPS * rows}", f"mesh.fsdp={CHIPS}")
    config = build.load_config(name, settings)
    report = aot.compile_for(config, topology.named("v5e:2x2"))
    assert report.fits
    sizes = [x.size for x in jax.tree.leaves(nn.unbox(build.abstract_params(config)))]
    for x in report.collectives:
        for _, shape in x.shapes:
            assert math.prod(shape) <= PADDED * max(sizes), x
            assert not [size for size in shape if size and size % rows == 0], x
    assert moved(report) < 1.5 * 3 * 2 * sum(sizes)
    drops_weights = config.model.get("attention_dropout", 0) > 0  # RAR and MAR
    assert ("splash" in report.attention) == (not drops_weights)


@pytest.mark.parametrize(
    ("b", "length", "heads", "head_dim", "is_causal"),
    [(32, 256, 20, 64, True), (32, 256, 16, 72, False), (16, 576, 24, 64, True)],
)
def test_a_kernel_takes_less_memory_than_scores(b, length, heads, head_dim, is_causal):
    mesh = mesh_lib.make_mesh(devices=topology.named("v5e:2x2").devices[:1])
    whole = mesh_lib.replicated(mesh)

    width = heads * head_dim
    shapes = (b, length, width), (width, 3, heads, head_dim), (heads, head_dim, width)
    args = [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=whole) for x in shapes]

    def temporary(dropout):
        @jax.checkpoint
        def block(x, inner, outer):  # with projections, between which the compiler lays things out
            qkv = jnp.einsum("bld,dchk->cblhk", x, inner)
            mixed = attention.attend(*qkv, is_causal=is_causal, dropout=dropout)
            return x + jnp.einsum("blhk,hkd->bld", mixed, outer)

        def loss(*args):
            return jnp.sum(block(*args).astype(jnp.float32) ** 2)

        program = compiled.Compiled(jax.grad(loss, argnums=(0, 1, 2)), mesh)
        return program.lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporary(dropout=None) < temporary(dropout=lambda weights: weights)


@pytest.mark.parametrize("name", ["llamagen_xl_256", "ar_xl_imagenet256", "mar_huge_imagenet256"])
def test_a_small_guided_sampler_does_not_communicate(name):
    settings = (*SMALL.get(name, TRUNK), "data.batch_size=8", "sampling.guidance_scale=2")
    config = build.load_config(name, settings)
    report = aot.compile_for(config, topology.named("v5e:2x2"), what="sample")
    assert report.fits and report.collectives == []


FULL = (
    "ar_xl_imagenet256",
    "mar_huge_imagenet256",
    "llamagen_xxl_384",
    "rar_xl",
    "cdm_xl_imagenet256",
    "joint_xl_imagenet256:joint_tensorar",
)
PIECES = {"ar_xl_imagenet256": 2, "mar_huge_imagenet256": 4, FULL[-1]: 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_full_update_fits_a_pod_and_moves_no_more_than_its_weights(name):
    config = build.load_config(name, ["mesh.fsdp=16"])
    report = aot.compile_for(config, topology.named("v5e:16x16"))
    assert report.fits and report.spare > 0.3
    assert moved(report) < 1.5 * 3 * 2 * num_params(config)
    for x in report.collectives:
        for _, shape in x.shapes:
            assert math.prod(shape) <= PADDED * largest_weight(config), x
            assert report.batch_size not in shape, x


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_full_update_fits_sixteen_chips_in_pieces(name):
    pieces = PIECES.get(name, 1)
    config = build.load_config(name, ["mesh.fsdp=16", f"training.num_accumulations={pieces}"])
    assert aot.compile_for(config, topology.named("v5e:4x4")).fits
