"""Models to official files and back by `run.converting`: nothing is lost, others are refused."""

import jax
import numpy as np
import pytest
import tiny

from arcond_jax import build
from arcond_jax.build import tokens
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


@pytest.mark.parametrize("name", CONFIGS)
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


@pytest.mark.parametrize("variant", ["tensorar", "joint", "ar"])
def test_windows_and_latents_have_no_official_format(variant):
    with pytest.raises(build.ConfigError, match="has no official format to export to"):
        converting.format_of(tiny.config(variant))
