"""Which families of models there are; networks, losses and samplers from a config."""

from typing import Any

from arcond_jax import types
from arcond_jax.build import family
from arcond_jax.build.families import dit, joint, llamagen, magvit2, mar, rar
from arcond_jax.config import Config, ConfigError

OURS = (
    *llamagen.FAMILIES.values(),
    joint.LATENTS,
    joint.BOTH,
    rar.RAR,
    magvit2.MAGVIT2,
    mar.MAR,
    dit.DIT,
)
FAMILIES = {record.name: record for record in OURS}


def register(record: family.Family) -> family.Family:
    """Makes a family known by its name: a config file may bring one, each time it is read.

    Raises:
      ValueError: A family that comes with the library has that name.
    """
    if record.name in {ours.name for ours in OURS}:
        raise ValueError(f"the library has a family {record.name}: take another name")
    FAMILIES[record.name] = record
    return record


def family_of(config: Config) -> family.Family:
    """The record of the config's model.

    Raises:
      ConfigError: There is none of that name.
    """
    return named(config.model.name)


def named(name: str) -> family.Family:
    """The record of a family.

    Raises:
      ConfigError: There is none of that name.
    """
    if name not in FAMILIES:
        raise ConfigError(f"model.name {name!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def network(config: Config) -> Any:
    """The Linen module."""
    return family_of(config).network(config)


def generator(config: Config, fitted: types.Tokenizer | None = None) -> family.Generator:
    """Initialisation and losses. Noise "codebook" needs the fitted tokenizer.

    Raises:
      ConfigError: The family is sampled only.
    """
    check_trained(config)
    make = family_of(config).generator
    assert make is not None
    return make(config, fitted)


def check_trained(config: Config) -> None:
    """Raises ConfigError for a model that is sampled only."""
    if family_of(config).generator is None:
        raise ConfigError(
            f"model {config.model.name} is not trained here: convert official weights with `arcond "
            "convert` and draw from them with `arcond sample`"
        )


def sampler(config: Config, *, trace: bool = False, num_known: int = 0) -> family.Sampler:
    """The sampling loop `(params, rng, prompt, *, refiner, ...) -> Sampled`, not yet compiled.

    Args:
      num_known: Tokens that are given.

    Raises:
      ConfigError: Tokens are given to a model that draws all of them.
    """
    record = family_of(config)
    if num_known and not record.keeps_tokens:
        able = ", ".join(name for name, x in FAMILIES.items() if x.keeps_tokens)
        raise ConfigError(f"model {config.model.name} draws every token: only {able} can keep some")
    return record.sampler(config, network(config), trace=trace, num_known=num_known)


def conditions(config: Config) -> family.Conditions | None:
    """What refinement needs to know of the model; None where nothing can be refined."""
    make = family_of(config).conditions
    return None if make is None else make(config)
