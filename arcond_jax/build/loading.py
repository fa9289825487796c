"""Config files with overrides, checked before anything is built from them."""

from collections.abc import Iterable, Mapping
from typing import Any

from arcond_jax import config as config_lib
from arcond_jax.build import checking, defaults
from arcond_jax.config import Config, ConfigError


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Reads `path[:variant]` and applies overrides of the form `section.key=value`.

    Raises:
      ConfigError: no such file or variant, an unknown key, or a value that cannot be used.
    """
    config = config_lib.read(path)
    checking.check(config)
    return with_overrides(config, overrides)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A copy of a config with `section.key=value` strings applied, checked.

    Raises:
      ConfigError: an unknown key, a value of the wrong type, or one no part could work with.
    """
    return changed(config, dict(config_lib.parse(text) for text in overrides))


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """A copy of a config with `section.key` set to values, checked.

    What decides which settings there are, the kind of refinement and of data, goes first. Other
    data keep whether images are mirrored.

    Raises:
      ConfigError: an unknown key, a value of the wrong type, or one no part could work with.
    """
    choices = defaults.choices_of(config)
    for name in defaults.CHOICES.keys() & settings.keys():
        if name not in defaults.LATER:
            raise ConfigError(
                f"config key {name} cannot be changed: it decides what else there is, so take "
                "another config"
            )
        choices[defaults.CHOICES[name]] = defaults.chosen(name, settings[name])
    made, there = defaults.filled(config, **choices), defaults.sections(**choices)
    if "views" in made.data and "random_flip" in config.data:
        made.data.views = "flip" if config.data.random_flip else "one"
    if "random_flip" in made.data and "views" in config.data:
        made.data.random_flip = config.data.views != "one"
    for name, value in settings.items():
        if name not in defaults.CHOICES:
            _assign(made, name, value, there)
    checking.check(made)
    return made


def _assign(config: Config, name: str, value: Any, there: dict[str, Any]) -> None:
    key = checking.key_of(config, name, there)
    section, _, leaf = name.rpartition(".")
    try:
        (config[section] if section else config)[leaf] = key.accept(name, value)
    except ValueError as error:
        raise ConfigError(str(error)) from None
