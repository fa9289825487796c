"""Images leave the device as uint8, in batches and pieces that no image depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from arcond_jax import build, types
from arcond_jax.data import images
from arcond_jax.parallel import memory
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.run import drawing, restoring
from arcond_jax.transport import refiners


@pytest.fixture(scope="module")
def trained(finished):
    return restoring.restore(finished)


@pytest.fixture(scope="module")
def drawer(trained):
    return drawing.Drawer(trained)


@pytest.fixture(scope="module")
def latents():
    """Of any size, so that pixels lie on both sides of [-1, 1] and some between two levels."""
    return np.random.default_rng(0).normal(0, 2, (70, 16, 4)).astype(np.float32)


def test_pixels_are_those_of_the_host_s_rule(drawer, latents):
    tokens = types.Tokens(latents=jnp.asarray(latents))
    image = np.asarray(jax.jit(drawer.trained.tokenizer.decode)(tokens))
    image_uint8 = drawer.decode(tokens)
    assert image.min() < -1.0 and image.max() > 1.0
    np.testing.assert_array_equal(image_uint8, images.image_to_uint8(image))


def test_halves_and_ends_of_the_scale_are_rounded_alike():
    levels = np.arange(-4, 520, dtype=np.float32) / 2
    image = (levels / np.float32(127.5) - 1).reshape(-1, 1, 1, 1)
    image_uint8 = jax.jit(drawing.to_uint8)(jnp.asarray(image))
    assert image_uint8.dtype == np.uint8
    np.testing.assert_array_equal(image_uint8, images.image_to_uint8(image))


def test_pieces_change_no_image(drawer, latents, monkeypatch):
    tokens = types.Tokens(latents=jnp.asarray(latents))
    whole = drawer.decode(tokens)
    assert len(whole) == 70
    monkeypatch.setattr(drawing, "DECODED", 24)
    np.testing.assert_array_equal(drawer.decode(tokens), whole)


@pytest.mark.long
def test_little_memory_changes_no_image(drawer, monkeypatch):
    label = np.arange(20, dtype=np.int32) % 10
    sizes, sample = [], drawing.Drawer.sample

    def watched(self, refiner, prompt, **options):
        sizes.append(len(prompt))
        return sample(self, refiner, prompt, **options)

    monkeypatch.setattr(drawing.Drawer, "sample", watched)
    plenty = drawer.images(refiners.Identity(), label, seed=3)
    shards = mesh_lib.num_batch_shards(drawer.trained.mesh)
    monkeypatch.setattr(memory, "of_device", lambda mesh: 1)
    little = drawer.images(refiners.Identity(), label, seed=3)
    assert len(sizes) == 1 + -(-20 // shards) and set(sizes[1:]) == {shards}
    np.testing.assert_array_equal(little, plenty)


def test_images_that_are_not_finite_are_counted(drawer, latents):
    broken = latents.copy()
    broken[[3, 65], 2, 1] = np.nan, np.inf
    with pytest.raises(drawing.NotFiniteError, match="2 of 70 images are not finite"):
        drawer.decode(types.Tokens(latents=jnp.asarray(broken)))


def test_noise_in_the_place_of_pictures_is_said(drawer, latents, caplog):
    drawer.decode(types.Tokens(latents=0.1 * jnp.asarray(latents)))
    assert not caplog.records
    drawer.decode(types.Tokens(latents=100.0 * jnp.asarray(latents)))
    assert "far beyond black or white" in caplog.text


def test_converted_weights_run_as_suits_a_cpu(monkeypatch):
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    params = {"kernel": jnp.zeros((3, 4))}

    def chosen(name):
        config = build.load_config(name, ())
        assert config.training.dtype == "bfloat16" and config.model.unroll == 1
        fast = restoring.for_platform(config, params, mesh)
        return fast.training.dtype, fast.model.unroll

    assert chosen("llamagen_b_256") == ("float32", 12)
    assert chosen("mar_base_imagenet256") == ("float32", 1)  # of two depths
    monkeypatch.setattr(memory, "of_device", lambda mesh: 100)
    assert chosen("llamagen_b_256") == ("float32", 1)  # no memory for a copy of the weights


def test_a_run_keeps_what_it_was_trained_with(trained):
    assert trained.config.to_dict() == tiny.config("joint").to_dict()
