"""What a config must be before anything is built from it; each refusal names the key."""

import difflib
import re
from typing import Any

from arcond_jax import config as config_lib
from arcond_jax.build import data, defaults, family, keys, models, tokens, training, transport
from arcond_jax.config import Config, ConfigError


def check(config: Config) -> None:
    """Raises ConfigError for a config that no part could work with."""
    settings = defaults.sections(**defaults.choices_of(config))
    for name in config_lib.flat(config):
        key_of(config, name, settings)
    try:
        for section, named in settings.items():
            for name, key in named.items():
                if section not in config or name not in config[section]:
                    raise ConfigError(f"the config lacks {section}.{name}")
                key.accept(f"{section}.{name}", config[section][name])
        for name, key in defaults.APART.items():
            key.accept(name, config.get(name))
        _check_together(config)
        # Building costs nothing and runs the checks of the parts themselves.
        training.optimizer(config)
        transport.options(config)
        models.sampler(config)
        if models.family_of(config).generator is not None:
            models.generator(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(_with_sections(config, str(error))) from None


def _with_sections(config: Config, message: str) -> str:
    """A part's message, in which a setting before its value is named with its section."""
    for name, value in config_lib.flat(config).items():
        leaf = re.escape(name.partition(".")[2])
        shown = "|".join(re.escape(text) for text in (str(value), repr(value)))
        if leaf and shown:
            message = re.sub(rf"(?<![\w.]){leaf}(?= (?:is )?(?:{shown})(?!\w))", name, message)
    return message


def _check_together(config: Config) -> None:
    """What no setting says alone."""
    record, kind = models.family_of(config), tokens.kind_of(config)
    if not set(record.draws) <= set(kind.gives):
        raise ConfigError(
            f"model {record.name} draws {' and '.join(record.draws)}, tokenizer "
            f"{config.tokenizer.name} gives {' and '.join(kind.gives)}"
        )
    if config.data.batch_size % config.training.num_accumulations:
        raise ConfigError(
            f"training.num_accumulations {config.training.num_accumulations} does not divide "
            f"data.batch_size {config.data.batch_size}"
        )
    for name, why in defaults.silent(config).items():
        value = config_lib.flat(config)[name]
        default = defaults.default_of(config, name)
        raise ConfigError(
            f"{name} {value!r} does nothing while {why}: leave it out, or set it to {default}"
        )
    record.check(config)
    transport.check(config, models.conditions(config))
    rows, columns = tokens.grid(config)
    _check_there(config, rows * columns)
    if "tensorar" in config:
        _check_windows(config, rows * columns)
    if config.sampling.get("speculative"):
        _check_speculative(config)
    if config.sampling.get("renoise"):
        _check_renoised(config)


def _check_there(config: Config, length: int) -> None:
    """Refuses more positions than there are."""
    positions = config.sampling.get("guided_positions")
    if positions is not None and positions > length:
        raise ConfigError(
            f"sampling.guided_positions {positions} must be at most {length}, the positions of "
            "the token grid; None for all"
        )


def _check_windows(config: Config, length: int) -> None:
    window = config.tensorar.window
    if window > length:
        raise ConfigError(
            f"tensorar.window {window} must be from 1 to the {length} positions of the token grid"
        )
    if window == 1 and config.tensorar.drafter:
        raise ConfigError("tensorar.window 1 leaves tensorar.drafter nothing to guess: 2 or more")
    weights = config.tensorar.draft_weights
    if weights is not None and len(weights) != window - 1:
        raise ConfigError(
            f"tensorar.draft_weights {tuple(weights)} must be {window - 1}, one for each entry of "
            f"tensorar.window {window} but the first"
        )
    if config.tensorar.noise == "codebook" and tokens.kind_of(config).codebook is None:
        raise ConfigError(
            f"tensorar.noise codebook mixes vectors of codes; those of tokenizer "
            f"{config.tokenizer.name} are signs, and a mix of signs is a hard switch from one code "
            "to the other: use categorical"
        )
    if config.tensorar.noise == "codebook" and len(config.model.get("factor_sizes", ())) > 1:
        raise ConfigError(
            "tensorar.noise codebook is for codes drawn whole, not in factors: use categorical"
        )


def _check_speculative(config: Config) -> None:
    """Rows are then at different positions, and drafts are the sampler's own."""
    alone = (("sampling.drafts", "off"), ("sampling.stride", 1), ("transport.inverse_weight", 0.0))
    values = config_lib.flat(config)
    for name, wanted in alone:
        if values.get(name, wanted) != wanted:
            raise ConfigError(
                f"sampling.speculative does not go with {name} {values[name]}: set it to {wanted}"
            )
    if config.transport.kind == "in_batch":
        raise ConfigError(
            "sampling.speculative does not go with transport.kind in_batch, which needs all rows "
            "at one position: use stored"
        )


def _check_renoised(config: Config) -> None:
    noise, drafts = config.tensorar.noise, config.tensorar.drafts
    if drafts == "masked" or noise in ("self", "none"):
        lacking = "tensorar.drafts masked" if drafts == "masked" else f"tensorar.noise {noise}"
        raise ConfigError(
            f"sampling.renoise needs a model whose drafts were noised in training, by "
            f"tensorar.noise categorical or codebook, not {lacking}: set it to False"
        )


def key_of(config: Config, name: str, settings: dict[str, Any]) -> keys.Key:
    """The `keys.Key` of one `section.key`, or of `name` or `seed`.

    Raises:
      ConfigError: The config has no such key, and why.
    """
    section, _, leaf = name.partition(".")
    if name in defaults.APART:
        return defaults.APART[name]
    if section in settings and leaf in settings[section]:
        return settings[section][leaf]
    raise ConfigError(f"unknown config key {name}: {_hint(config, name, settings)}")


def _hint(config: Config, name: str, settings: dict[str, Any]) -> str:
    section, _, leaf = name.partition(".")
    owners = _owners(section, leaf)
    if owners:
        return f"it goes with {owners}, and this config has {_choices(config)}"
    known = ["seed", *(f"{s}.{x}" for s, named in settings.items() for x in named)]
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    if section in settings and leaf:
        return f"the section has {', '.join(settings[section])}"
    return f"sections are {', '.join(sorted(settings))}"


def _owners(section: str, leaf: str) -> str:
    """The choices that bring a key, in words; empty if none does."""
    if section == "tensorar" and leaf in family.TENSORAR:
        return "configs of windows (digits:tensorar is one)"
    chosen = {
        "tokenizer": ("tokenizer", tokens.TOKENIZERS),
        "data": ("data", data.DATA),
        "transport": ("transport.kind", transport.KINDS),
    }
    if section in chosen:
        word, records = chosen[section]
        names = [x for x, record in records.items() if leaf in record.section]
        if names:
            return f"{word} {', '.join(names)}"
    names = [x for x, record in models.FAMILIES.items() if leaf in record.sections.get(section, {})]
    if section == "sampling" and leaf in family.DRAFTS:
        return "configs of windows (digits:tensorar is one)"
    if section == "sampling" and leaf in family.STRIDE | family.SPECULATIVE:
        return "configs of windows over codes alone (digits:tensorar is one)"
    return f"model {', '.join(names)}" if names else ""


def _choices(config: Config) -> str:
    return (
        f"model {config.model.name}, tokenizer {config.tokenizer.name}, data {config.data.name}, "
        f"transport.kind {config.transport.kind}"
    )
