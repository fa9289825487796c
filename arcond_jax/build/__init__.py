"""From a config to objects; the only place that knows what a config looks like.

Every function takes the whole config and returns a plain object or a pure function, so a
researcher can take one part and leave the rest.
"""

from arcond_jax.build.loading import check, load_config, with_overrides
from arcond_jax.build.models import (
    Generator,
    Network,
    Sampler,
    check_trained,
    generator,
    head,
    network,
    sampler,
    solver,
)
from arcond_jax.build.tokens import (
    WEIGHTS,
    abstract_tokenizer,
    abstract_trained,
    grid,
    has_codes,
    has_latents,
    image_shape,
    load_weights,
    num_codes,
    source,
    token_channels,
    tokenizer,
    tokenizer_network,
)
from arcond_jax.build.training import (
    abstract_params,
    abstract_state,
    empty_bank,
    mesh,
    optimizer,
    refine_options,
    train_state,
    train_step,
)
from arcond_jax.config import Config, ConfigError

__all__ = [
    "WEIGHTS",
    "Config",
    "ConfigError",
    "Generator",
    "Network",
    "Sampler",
    "abstract_params",
    "abstract_state",
    "abstract_tokenizer",
    "abstract_trained",
    "check",
    "check_trained",
    "empty_bank",
    "generator",
    "grid",
    "has_codes",
    "has_latents",
    "head",
    "image_shape",
    "load_config",
    "load_weights",
    "mesh",
    "network",
    "num_codes",
    "optimizer",
    "refine_options",
    "sampler",
    "solver",
    "source",
    "token_channels",
    "tokenizer",
    "tokenizer_network",
    "train_state",
    "train_step",
    "with_overrides",
]
