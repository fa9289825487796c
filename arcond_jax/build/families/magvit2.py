"""Open-MAGVIT2: large codes in two factors."""

import functools
import math

from arcond_jax import types
from arcond_jax.build import family, keys, official, tokens
from arcond_jax.config import Config, ConfigError
from arcond_jax.convert import magvit2 as table
from arcond_jax.models import magvit2

LATER = {  # of a code's factors after the first; None for that of the first
    "later_guidance_scale": keys.number(None, low=-1000.0, high=1000.0, optional=True),
    "later_code_temperature": keys.positive(None, optional=True),
}


def network(config: Config) -> types.CausalModel:
    """The Linen module."""
    apart = ("factor_sizes", "intra_depth")
    inner = magvit2.MAGVIT2(
        num_classes=config.data.num_classes,
        factor_sizes=tuple(config.model.factor_sizes),
        intra_depth=config.model.intra_depth,
        **family.prompted(config, *apart),
    )
    return family.windowed(config, inner)


def generator(config: Config, fitted: types.Tokenizer | None) -> magvit2.Generator:
    """Cross-entropy of the factors of codes."""
    return magvit2.Generator(
        network(config),
        (family.code_loss(config),),
        **family.windows_of(config, fitted),
        label_dropout=config.loss.label_dropout,
    )


def check(config: Config) -> None:
    """Raises ConfigError if the factors do not make the tokenizer's codes."""
    family.check_gpt(config)
    factor_sizes = tuple(config.model.factor_sizes)
    made, there = math.prod(factor_sizes), tokens.num_codes(config)
    if made != there:
        raise ConfigError(
            f"model.factor_sizes {factor_sizes} make {made} codes, tokenizer "
            f"{config.tokenizer.name} has {there}"
        )


MAGVIT2 = family.Family(
    name="magvit2",
    sections={
        "model": family.GPT
        | {
            "factor_sizes": keys.sizes(magvit2.FACTOR_SIZES),
            "intra_depth": keys.integer(2),
            "token_dropout": keys.share(0.1),
        },
        "loss": family.PROMPT_LOSS,
        "sampling": family.GUIDED | family.GUIDED_POSITIONS | family.CODES | LATER,
    },
    draws=("codes",),
    network=network,
    sampler=family.causal_sampler,
    generator=generator,
    conditions=family.each_position,
    official=official.Official(
        "magvit2",
        ("magvit2_b", "magvit2_l", "magvit2_xl"),
        functools.partial(table.rows, prefix=table.PREFIX),
        container=("state_dict",),
        ignored=table.IGNORED,
        fits=lambda config: "tensorar" not in config,
    ),
    check=check,
)
