"""Every backbone computes on a mesh what it computes on one device.

With parameters away from their initial values: what starts at zero hides what is wrong behind it.
"""

import functools

import jax
import numpy as np
import pytest
import tiny

from arcond_jax import build
from arcond_jax.models import losses
from arcond_jax.parallel import compiled
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.run import refinement, restoring
from arcond_jax.transport import refiners

MESHES = {
    "8x1x1": dict(data=8),
    "2x4x1": dict(data=2, fsdp=4),
    "2x2x2": dict(data=2, fsdp=2, tensor=2),
    "1x8x1": dict(fsdp=8),
    "1x1x8": dict(tensor=8),
}
LABEL = np.arange(8, dtype=np.int32)
HEADS = ("model.depth=2", "model.width=32", "model.num_heads=8")
HEAD_WIDTH = ("diffusion_head.width=32",)
CODES = ("tokenizer.num_codes=8",)
GUIDED = ("sampling.guidance_scale=2",)
CLIPPED = ("sampling.clip_latents=2", "sampling.num_head_evaluations=2")
MAR = (
    "model.encoder_width=32",
    "model.decoder_width=32",
    "model.encoder_num_heads=8",
    "model.decoder_num_heads=8",
    "sampling.num_ar_steps=2",
    "sampling.num_buckets=1",
)
STORED = ("transport.kind=stored", "transport.epsilon=1")  # less would enlarge roundings
RESIDUAL = ("transport.kind=residual", "transport.num_directions=8")
REFINED = ("mar", "joint")  # others are drawn plainly
SETTINGS = {
    "mar": (*MAR, *HEAD_WIDTH, *CLIPPED, *STORED),
    "ar": (*HEADS, *HEAD_WIDTH, *CLIPPED),
    "joint": (*HEADS, *HEAD_WIDTH, *CLIPPED, *GUIDED, *RESIDUAL),
    "tensorar": (*HEADS, *GUIDED),
    "dit": (*HEADS, *CLIPPED, *GUIDED),
    "rar": (*HEADS, "model.mlp_hidden=64", *CODES, *GUIDED),
    "llamagen": (*HEADS, *CODES, *GUIDED),
    "magvit2": (*HEADS, "model.factor_sizes=(2,4)", *CODES, *GUIDED),
}


class Backbone:
    """A family with its parameters, refiner and data."""

    def __init__(self, family):
        self.config = tiny.config(family, *SETTINGS[family])
        self.boxed = build.abstract_params(self.config)
        # Not so large that a rounding grows from position to position.
        self.params = tiny.random_params(self.boxed, scale=0.1)
        self.tokenizer = build.tokenizer(self.config)
        split = build.source(self.config, "train")
        self.image = np.stack([split[i]["image"] for i in range(len(LABEL))])
        self.refiner = self._refiner() if family in REFINED else refiners.Identity()

    def _refiner(self):
        mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
        trained = restoring.Trained(self.config, mesh, self.tokenizer, self.params, None, 0, None)
        return jax.device_get(refinement.calibrate(trained))

    @functools.cache  # noqa: B019  # as long as the tests of the module
    def on(self, mesh):
        """Loss, gradient and tokens, on the host; `mesh` None is one device."""
        devices = jax.devices()[:1] if mesh is None else None
        mesh = mesh_lib.make_mesh(devices=devices, **({} if mesh is None else MESHES[mesh]))
        generator, loop = build.generator(self.config), build.sampler(self.config)

        def run(params, tokenizer, refiner, image, label):
            key = jax.random.key(1)
            tokens = tokenizer.encode(image)
            loss, gradient = jax.value_and_grad(
                lambda params: generator.loss(params, tokens, label, key)[0]
            )(params)
            drawn = loop(params, key, label, refiner=refiner, code_law=tokenizer.code_law)
            return loss, gradient, drawn.tokens

        whole, batch = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)
        places = (mesh_lib.tree_shardings(self.boxed, mesh), whole, whole, batch, batch)
        args = (self.params, self.tokenizer, self.refiner, self.image, LABEL)
        program = compiled.Compiled(run, mesh, in_shardings=places)
        return jax.device_get(program(*jax.device_put(args, places)))


backbone = functools.cache(Backbone)


@pytest.fixture(scope="module", autouse=True)
def few_rows():
    """Windows are unfolded in several pieces: of one image 4 positions, of all 8 images one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "ROWS", 4)
        yield


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        pytest.param(family, mesh, marks=pytest.mark.long if mesh == "2x2x2" else pytest.mark.slow)
        for family in SETTINGS
        for mesh in MESHES
    ],
)
def test_loss_gradient_and_samples_are_those_of_one_device(family, mesh):
    loss, gradient, tokens = backbone(family).on(None)
    mesh_loss, mesh_gradient, mesh_tokens = backbone(family).on(mesh)
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradient)))
    assert norm > 0
    for ours, theirs in zip(jax.tree.leaves(mesh_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * norm)
    if tokens.codes is not None:
        np.testing.assert_array_equal(mesh_tokens.codes, tokens.codes)
    if tokens.latents is not None:
        assert np.std(tokens.latents) > 0.1
        np.testing.assert_allclose(mesh_tokens.latents, tokens.latents, rtol=0, atol=1e-5)
