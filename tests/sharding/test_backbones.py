"""Every backbone computes on a mesh what it computes on one device.

With parameters away from their initial values: what starts at zero hides what is wrong behind it.
"""

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from arcond_jax import build
from arcond_jax.parallel import compiled
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.transport import refiners

MESHES = (dict(devices=jax.devices()[:1]), dict(data=2, fsdp=2, tensor=2))
LABEL = np.arange(8, dtype=np.int32)
MAR = (
    "sampling.num_ar_steps=2",
    "sampling.num_buckets=1",
    "sampling.num_head_evaluations=2",
)
DIT = (
    "model.depth=2",
    "model.width=16",
    "model.num_heads=2",
    "sampling.num_head_evaluations=2",
    "sampling.clip_latents=2",
    "sampling.guidance_scale=2",
)


def config_of(backbone):
    if backbone == "mar":
        return tiny.config("mar", *MAR)
    return build.with_overrides(build.config(model="dit", tokenizer="pixels", data="digits"), DIT)


@pytest.mark.parametrize("backbone", ["mar", "dit"])
def test_loss_and_samples_are_those_of_one_device(backbone):
    config = config_of(backbone)
    generator, loop = build.generator(config), build.sampler(config)
    boxed = jax.eval_shape(generator.init, jax.random.key(0))
    leaves, structure = jax.tree.flatten(nn.unbox(boxed))
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(
        structure, [0.2 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    )
    tokenizer = build.tokenizer(config)
    image = np.stack([build.source(config, "train")[i]["image"] for i in range(len(LABEL))])

    def run(params, tokenizer, image, label):
        key = jax.random.key(1)
        loss, _ = generator.loss(params, tokenizer.encode(image), label, key)
        return loss, loop(params, key, label, refiner=refiners.Identity()).tokens.latents

    found = []
    for options in MESHES:
        mesh = mesh_lib.make_mesh(**options)
        whole, batch = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)
        places = (mesh_lib.tree_shardings(boxed, mesh), whole, batch, batch)
        args = jax.device_put((params, tokenizer, image, LABEL), places)
        found.append(compiled.Compiled(run, mesh, in_shardings=places)(*args))
    (loss, latents), (mesh_loss, mesh_latents) = found
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-5)
    assert np.abs(latents).max() > 0.1
    np.testing.assert_allclose(mesh_latents, latents, rtol=1e-3, atol=1e-3)
