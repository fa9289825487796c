"""Guided samplers with whole weights on every device need nothing from each other."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tiny

from arcond_jax import build, types
from arcond_jax.parallel import compiled
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.transport import refiners

COLLECTIVE = re.compile(
    r"all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
)
GUIDED = ("sampling.guidance_scale=2.0", "sampling.guidance_schedule=linear")
VARIANTS = {
    "joint": ("sampling.drafts=feed",),
    "tensorar": ("sampling.top_k=3", "sampling.stride=2"),
    "mar": ("sampling.num_ar_steps=2", "sampling.num_head_evaluations=2"),
}


@pytest.mark.parametrize(
    "variant", [pytest.param(x, marks=pytest.mark.long) if x != "joint" else x for x in VARIANTS]
)
def test_a_guided_sampler_does_not_communicate(variant):
    config = tiny.config(variant, *GUIDED, *VARIANTS[variant])
    loop, mesh = build.sampler(config), mesh_lib.make_mesh(data=8)
    law = jax.eval_shape(lambda: build.tokenizer(config).code_law)

    def sample(params, rng, label, law):
        return loop(params, rng, label, refiner=refiners.Identity(), code_law=law).tokens

    def placed(tree, place):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    whole, rows = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)
    args = (
        placed(nn.unbox(build.abstract_params(config)), whole),
        placed(jax.eval_shape(jax.random.key, 0), whole),
        placed(jax.eval_shape(lambda: jnp.zeros(16, jnp.int32)), rows),
        placed(law, whole),
    )
    out = jax.eval_shape(sample, *args)
    places = jax.tree.map(lambda x: rows, out, is_leaf=lambda x: isinstance(x, types.Tokens))
    program = compiled.Compiled(sample, mesh, out_shardings=places).lower(*args).compile()
    found = COLLECTIVE.findall(program.as_text())
    assert not found
