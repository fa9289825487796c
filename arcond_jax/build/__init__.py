"""From a config to objects: what people import.

    from arcond_jax import build

    config = build.load_config("digits:joint", ["model.depth=2"])
    generator = build.generator(config)   # .init(rng), .loss(params, tokens, prompt, rng)
    sampler = build.sampler(config)       # (params, rng, prompt, refiner=...) -> tokens

Every function takes the whole config and returns a plain object or a pure function, so a
researcher can take one part and leave the rest. This is the only package that knows what a config
looks like.
"""

from arcond_jax.build.checking import check
from arcond_jax.build.data import examples, image_shape, source
from arcond_jax.build.defaults import config, with_windows
from arcond_jax.build.family import Conditions, Family, Generator, Sampler, noise_codebook
from arcond_jax.build.loading import changed, load_config, with_overrides
from arcond_jax.build.models import (
    check_trained,
    conditions,
    family_of,
    generator,
    network,
    register,
    sampler,
)
from arcond_jax.build.official import Official
from arcond_jax.build.tokens import (
    abstract_tokenizer,
    check_cache,
    check_law,
    grid,
    num_codes,
    part,
    token_channels,
    tokenizer,
    tokenizer_network,
    tokens_of,
)
from arcond_jax.build.training import (
    abstract_params,
    abstract_state,
    empty_bank,
    mesh,
    optimizer,
    train_state,
    train_step,
    training_mesh,
    window_metrics,
)
from arcond_jax.config import Config, ConfigError

__all__ = [
    "Conditions",
    "Config",
    "ConfigError",
    "Family",
    "Generator",
    "Official",
    "Sampler",
    "abstract_params",
    "abstract_state",
    "abstract_tokenizer",
    "changed",
    "check",
    "check_cache",
    "check_law",
    "check_trained",
    "conditions",
    "config",
    "empty_bank",
    "examples",
    "family_of",
    "generator",
    "grid",
    "image_shape",
    "load_config",
    "mesh",
    "network",
    "noise_codebook",
    "num_codes",
    "optimizer",
    "part",
    "register",
    "sampler",
    "source",
    "token_channels",
    "tokenizer",
    "tokenizer_network",
    "tokens_of",
    "train_state",
    "train_step",
    "training_mesh",
    "window_metrics",
    "with_overrides",
    "with_windows",
]
