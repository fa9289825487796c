"""Config files with overrides, checked before anything is built from them."""

from collections.abc import Iterable

import numpy as np

from arcond_jax import config as config_lib
from arcond_jax.build import models, tokens, training
from arcond_jax.config import Config, ConfigError
from arcond_jax.nn import stack

REFINEMENTS = ("none", "stored", "bures", "residual", "in_batch")


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Reads `path[:variant]` and applies overrides of the form `section.key=value`.

    Raises:
      ConfigError: no such file or variant, an unknown key, or a value that cannot be used.
    """
    return with_overrides(config_lib.read(path), overrides)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Applies `section.key=value` strings in place and checks the result.

    Raises:
      ConfigError: an unknown key, a value of the wrong type, or one no part could work with.
    """
    for override in overrides:
        config_lib.override(config, override)
    check(config)
    return config


def check(config: Config) -> None:
    """Raises ConfigError for values that no part could work with, naming the key."""
    _check_choice("backbone", config.backbone, models.BACKBONES)
    _check_choice("data.name", config.data.name, tokens.SOURCES)
    _check_choice("tokenizer.name", config.tokenizer.name, tokens.TOKENIZERS)
    _check_choice("training.dtype", config.training.dtype, tokens.DTYPES)
    _check_choice("transport.kind", config.transport.kind, REFINEMENTS)
    _check_choice("transport.grouping", config.transport.grouping, ("class", "shared"))
    for backbone in ("gpt", "mar", "dit", "rar"):
        _check_choice(f"{backbone}.remat", config[backbone].remat, stack.REMAT)
    sizes = ("depth", "width", "num_heads")
    positive = {
        "data": ("batch_size", "image_size", "num_channels"),
        "tokenizer": ("patch_size", "num_codes"),
        "kl": ("width", "num_blocks", "latent_channels"),
        "vq": ("width", "num_blocks", "latent_channels", "num_codes", "code_width"),
        "maskgit_vq": ("width", "num_blocks", "num_codes", "code_width"),
        "lfq": ("width", "num_blocks", "num_bits"),
        "gpt": (*sizes, "unroll"),
        "mar": (
            *(f"{part}_{name}" for part in ("encoder", "decoder") for name in sizes),
            "buffer_size",
            "unroll",
        ),
        "dit": (*sizes, "unroll"),
        "rar": (*sizes, "mlp_hidden", "unroll"),
        "magvit2": ("intra_depth",),
        "captioned": ("num_prefix", "caption_width"),
        "diffusion_head": ("depth", "width"),
        "loss": ("num_copies",),
        "training": ("num_accumulations", "log_every", "checkpoint_every", "checkpoints_kept"),
        "sampling": ("num_head_evaluations", "stride"),
        "transport": ("num_atoms", "num_directions", "num_sources"),
    }
    if config.backbone != "captioned":  # its labels are captions, which come with sampling
        positive["data"] += ("num_classes",)
    values = config_lib.flat(config)
    for key in (f"{section}.{name}" for section, names in positive.items() for name in names):
        if values[key] < 1:
            raise ConfigError(f"{key} {values[key]} must be at least 1")
    length = int(np.prod(tokens.grid(config)))
    if not 1 <= config.tensorar.window <= length:
        raise ConfigError(
            f"tensorar.window {config.tensorar.window} must be from 1 to the {length} positions of "
            "the token grid"
        )
    for section, part in (
        ("gpt", ""),
        ("mar", "encoder_"),
        ("mar", "decoder_"),
        ("dit", ""),
        ("rar", ""),
    ):
        width, heads = (values[f"{section}.{part}{name}"] for name in ("width", "num_heads"))
        if width % heads:
            raise ConfigError(
                f"{section}.{part}width {width} is not divisible by {section}.{part}num_heads "
                f"{heads}"
            )
    weights = (config.loss.w_diffusion, config.loss.w_tensor)
    if min(weights) < 0 or max(weights) == 0:
        raise ConfigError(
            f"loss.w_diffusion {weights[0]} and loss.w_tensor {weights[1]} must not be negative, "
            "and not both 0"
        )
    kind = config.tokenizer.name
    codes_alone = config.backbone in ("rar", "magvit2", "captioned")
    if weights[0] and (codes_alone or not tokens.has_latents(config)):
        raise ConfigError(
            f"loss.w_diffusion {weights[0]} needs latents, which backbone {config.backbone} on "
            f"tokenizer {kind} has not: set it to 0"
        )
    if weights[1] and (config.backbone in ("mar", "dit") or not tokens.has_codes(config)):
        raise ConfigError(
            f"loss.w_tensor {weights[1]} needs codes, which backbone {config.backbone} on "
            f"tokenizer {kind} has not: set it to 0"
        )
    if config.backbone == "magvit2":
        product = int(np.prod(config.magvit2.factor_sizes))
        if product != tokens.num_codes(config):
            raise ConfigError(
                f"magvit2.factor_sizes {tuple(config.magvit2.factor_sizes)} make {product} codes, "
                f"tokenizer {kind} has {tokens.num_codes(config)}"
            )
    if config.backbone == "dit" and config.transport.kind != "none":
        raise ConfigError(
            f"transport.kind {config.transport.kind} needs a condition per token, and backbone dit "
            "has one for all: set it to none"
        )
    if config.backbone == "captioned" and config.transport.kind != "none":
        raise ConfigError(
            f"transport.kind {config.transport.kind} needs images of each class, and backbone "
            "captioned has captions in place of classes: set it to none"
        )
    if config.data.batch_size % config.training.num_accumulations:
        raise ConfigError(
            f"training.num_accumulations {config.training.num_accumulations} does not divide "
            f"data.batch_size {config.data.batch_size}"
        )
    # Building costs nothing and runs the checks of the parts themselves.
    try:
        training.optimizer(config)
        training.refine_options(config)
        models.sampler(config)
        if config.tensorar.noise != "codebook" and config.backbone != "captioned":
            models.generator(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_choice(key: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} {value!r} is not one of {', '.join(allowed)}")
