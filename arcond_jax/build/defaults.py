"""What a config holds: the settings that its run uses and no others, each at its default.

Four choices decide which they are: the model, the tokenizer, the data and the refinement. A config
file makes them by `config(...)`, and assigns over it.
"""

from collections.abc import Mapping
from typing import Any

from arcond_jax import config as config_lib
from arcond_jax.build import data as data_lib
from arcond_jax.build import family, keys, models, tokens
from arcond_jax.build import transport as transport_lib
from arcond_jax.config import Config, ConfigError
from arcond_jax.training import optimizer

TRAINING = {
    "num_train_steps": keys.integer(1000),
    "num_warmup_steps": keys.integer(100, low=0),
    "learning_rate": keys.positive(1e-4, low=1e-12, high=10.0),
    "decay": keys.choice("constant", optimizer.DECAYS),
    "decay_to": keys.number(0.0, low=0.0, high=1.0),  # of the learning rate
    "b1": keys.share(0.9),
    "b2": keys.share(0.95),
    "weight_decay": keys.number(0.02, low=0.0, high=10.0),
    "clip_norm": keys.positive(1.0, high=1e12, optional=True),
    "ema_decay": keys.share(0.9999),
    "num_accumulations": keys.integer(1),
    "dtype": keys.choice("float32", tuple(tokens.DTYPES)),
    "log_every": keys.integer(50),
    "samples_every": keys.integer(None, optional=True),
    "checkpoint_every": keys.integer(500),
    "checkpoints_kept": keys.integer(2),
}
EVALUATION = {  # while a run trains
    "every": keys.integer(None, optional=True),
    "num_images": keys.integer(1000, low=2),
    "inception": keys.text(None, optional=True),  # the small classifier of the run
    "reference": keys.text(None, optional=True),  # the held-out images of the data
}
MESH = {
    "data": keys.integer(None, optional=True),  # all devices that are left
    "fsdp": keys.integer(1),
    "tensor": keys.integer(1),
}
# What decides which settings there are, by the key that says it.
CHOICES = {
    "model.name": "model",
    "tokenizer.name": "tokenizer",
    "data.name": "data",
    "transport.kind": "transport",
}
# Of windows that are fed back, and of the training of the model inside.
OF_WINDOWS = (
    *("sampling.drafts", "sampling.speculative", "tensorar.residual", "tensorar.base_rate"),
)
OF_BASE = (
    *("sampling.drafts", "tensorar.projection", "tensorar.residual", "tensorar.base_rate"),
    *("sampling.stride", "loss.w_tensor"),
    *("tensorar.drafts", "tensorar.noise", "tensorar.noise_schedule", "tensorar.nested"),
    "tensorar.draft_weight",
)
OF_NOISE = ("tensorar.noise", "tensorar.noise_schedule", "tensorar.nested")
OF_EVALUATION = tuple(f"evaluation.{name}" for name in EVALUATION if name != "every")
# Settings in no section. A key of JAX is made of 32 bits.
APART = {"name": keys.text(""), "seed": keys.integer(0, low=0, high=2**32 - 1)}
NAMES = ("name", "kind")  # of settings that a choice has made already
LATER = ("data.name", "transport.kind")  # those that may be changed in a config that is there


def sections(
    *, model: str, tokenizer: str, data: str, transport: str, windows: bool
) -> dict[str, dict[str, keys.Key]]:
    """The settings of a config by section, `name` and `seed` apart; arguments as of `config`."""
    record = models.named(model)
    kinds = {
        "tokenizer.name": (tokenizer, tokens.TOKENIZERS),
        "data.name": (data, data_lib.DATA),
        "transport.kind": (transport, transport_lib.KINDS),
    }
    for key, (chosen, there) in kinds.items():
        if chosen not in there:
            raise ConfigError(f"{key} {chosen!r} is not one of {', '.join(there)}")
    if windows and "codes" not in record.draws:
        raise ConfigError(f"model {model} predicts no codes, so it has no section tensorar")
    made: dict[str, dict[str, keys.Key]] = {
        "data": {"name": keys.text(data), **data_lib.DATA[data].section},
        "tokenizer": {"name": keys.text(tokenizer), **tokens.TOKENIZERS[tokenizer].section},
        "model": {"name": keys.text(model)},
    }
    if windows:
        made["tensorar"] = dict(family.TENSORAR)
    made |= {
        "loss": {},
        "training": dict(TRAINING),
        "evaluation": dict(EVALUATION),
        "mesh": dict(MESH),
        "sampling": {},
    }
    for section, added in record.sections.items():
        made.setdefault(section, {}).update(added)
    if windows:
        made["sampling"] |= family.DRAFTS
        if record.draws == ("codes",):
            made["sampling"] |= family.STRIDE | family.SPECULATIVE
    kind = transport_lib.KINDS[transport]
    made["transport"] = {"kind": keys.text(transport), **kind.section}
    return made


def config(
    *,
    model: str,
    tokenizer: str,
    data: str = "folder",
    transport: str = "none",
    windows: bool = False,
) -> Config:
    """A config with the defaults of its choices.

    Args:
      model, tokenizer, data: Names of a model family, a kind of tokenizer and of data.
      transport: Kind of refinement.
      windows: Whether it has a section `tensorar`.

    Raises:
      ConfigError: A choice that does not exist, or windows for a model that has none.
    """
    choices = dict(model=model, tokenizer=tokenizer, data=data, transport=transport)
    return filled({}, windows=windows, **choices)


def with_windows(config: Config) -> Config:
    """A copy of a config with a section `tensorar`, at its defaults."""
    return filled(config, **(choices_of(config) | {"windows": True}))


def choices_of(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """The choices that decide which settings a config has; arguments as of `config`."""
    values = {}
    for name, choice in CHOICES.items():
        section, key = name.split(".")
        if section in config and not isinstance(config[section], Mapping | Config):
            raise ConfigError(f"config key {section} must be a section, not {config[section]!r}")
        if section not in config or key not in config[section]:
            raise ConfigError(f"the config lacks {name}")
        values[choice] = chosen(name, config[section][key])
    return values | {"windows": "tensorar" in config}


def chosen(name: str, value: Any) -> str:
    """The value of a choice; raises ConfigError if it is no word."""
    if not isinstance(value, str):
        raise ConfigError(f"config key {name} wants str, not {str(value)!r}")
    return value


def filled(values: Config | Mapping[str, Any], **choices: Any) -> Config:
    """A config of the given choices: its defaults, and over them what is there of `values`."""
    made: dict[str, Any] = {name: values.get(name, key.default) for name, key in APART.items()}
    for section, settings in sections(**choices).items():
        given = values.get(section, {})
        made[section] = {
            name: _value(key, given.get(name, key.default) if name not in NAMES else key.default)
            for name, key in settings.items()
        }
    return config_lib.made_of(made)


def default_of(config: Config, name: str) -> Any:
    """The default of a `section.key`."""
    section, key = name.split(".")
    return sections(**choices_of(config))[section][key].default


def silent(config: Config) -> dict[str, str]:
    """Settings that differ from their default and do nothing beside others, and why."""
    found, get = {}, config_lib.flat(config).get
    rules = (
        (get("tensorar.drafts") == "masked", "tensorar.drafts is masked", OF_NOISE),
        (get("tensorar.noise") == "none", "tensorar.noise is none", OF_NOISE[1:]),
        (get("tensorar.noise") == "self", "tensorar.noise is self", OF_NOISE[2:]),
        (get("tensorar.window") == 1, "tensorar.window is 1", OF_WINDOWS),
        (
            get("sampling.speculative") is False,
            "sampling.speculative is False",
            ("sampling.relaxed_acceptance",),
        ),
        (get("tensorar.drafter"), "tensorar.drafter is True", OF_BASE),
        (
            get("tensorar.residual") is False,
            "tensorar.residual is False",
            ("tensorar.projection",),
        ),
        (get("sampling.drafts") != "feed", "sampling.drafts is not feed", ("sampling.renoise",)),
        (
            get("sampling.solver", "ancestral") != "ancestral",
            "sampling.solver is not ancestral",
            ("sampling.latent_temperature",),
        ),
        (get("evaluation.every") is None, "evaluation.every is None", OF_EVALUATION),
        (get("training.decay") == "constant", "training.decay is constant", ("training.decay_to",)),
    )
    settings = sections(**choices_of(config))
    for holds, why, names in rules:
        for name in names if holds else ():
            section, key = name.split(".")
            if key in settings.get(section, {}) and get(name) != settings[section][key].default:
                found.setdefault(name, why)
    return found


def _value(key: keys.Key, value: Any) -> Any:
    if key.kind is tuple:
        value = None if value is None else tuple(value)  # saved as a list
    return config_lib.Optional(key.kind, value) if key.optional else value
