"""Models to official files and back by `run.converting`: nothing is lost, others are refused."""

import jax
import numpy as np
import pytest
import tiny

from arcond_jax import build, checkpoint
from arcond_jax.build import tokens
from arcond_jax.convert import files
from arcond_jax.run import converting

SMALL = (
    "data.image_size=32",
    "model.depth=2",
    "model.width=16",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.mlp_hidden=24",
    "tokenizer.num_codes=12",
)
CONFIGS = {
    "llamagen": ("llamagen_b_256", *SMALL),
    "llamagen_t2i": (
        "llamagen_t2i_xl_256",
        *SMALL,
        "model.num_caption_vectors=3",
        "model.caption_width=8",
    ),
}


@pytest.mark.parametrize("name", [pytest.param("llamagen", marks=pytest.mark.slow), "llamagen_t2i"])
def test_llamagen_of_classes_and_of_captions(name, tmp_path):
    path, *overrides = CONFIGS[name]
    config = build.load_config(path, overrides)
    assert converting.format_of(config) == name
    params = tiny.random_params(build.abstract_params(config))
    file, out = tmp_path / "weights.safetensors", tmp_path / "converted"
    converting.export(name, params, config, file)
    assert converting.convert(name, file, out, config=config).to_dict() == config.to_dict()
    restored = tokens.load_weights(str(out), jax.eval_shape(lambda: params))
    jax.tree.map(np.testing.assert_array_equal, restored, params)


# What the official code reads: --resume of MAR, sample_c2i.py of LlamaGen, demo_util.py of RAR,
# sample.py of Open-MAGVIT2, and the code of each tokenizer.
CONTAINERS = {
    "mar": ("model", "model_ema"),
    "llamagen": ("model",),
    "llamagen_t2i": ("model",),
    "rar": (),
    "magvit2": ("state_dict",),
    "kl16": ("model",),
    "vq": ("model",),
    "maskgit_vq": (),
    "lfq": ("state_dict",),
}


def test_containers_of_the_official_code():
    formats = converting.formats()
    assert {name: made.official.container for name, made in formats.items()} == CONTAINERS
    for made in formats.values():  # what is exported is found again
        official = made.official
        assert not official.container or {*official.ema, *official.raw} & {*official.container}


def test_no_official_name_is_that_of_a_wrapper():
    """They are left out of the names, wherever they stand."""
    for made in converting.formats().values():
        config = build.load_config(made.official.configs[0])
        for row in made.rows(config):
            assert not {*files.WRAPPERS} & {part for name in row.theirs for part in name.split(".")}


@pytest.mark.parametrize("weights", ["nan", "inf"])
def test_weights_that_are_not_finite_are_not_loaded(weights, tmp_path):
    params = {"a": np.ones(3, np.float32), "b": {"c": np.float32([1, weights])}}
    checkpoint.save_tree(f"{tmp_path}/{tokens.WEIGHTS}", {"params": params}, {})
    message = f"{tmp_path} holds weights that are not finite, in b/c: the training diverged"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        tokens.load_weights(str(tmp_path), jax.eval_shape(lambda: params))


@pytest.mark.parametrize("variant", ["tensorar", "joint", "ar"])
def test_windows_and_latents_have_no_official_format(variant):
    with pytest.raises(build.ConfigError, match="has no official format to export to"):
        converting.format_of(tiny.config(variant))
