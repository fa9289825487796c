"""Configs as checkpoints hold them, and the trees beside them, of this version and earlier ones."""

from collections.abc import Mapping
from typing import Any

from arcond_jax import config as config_lib
from arcond_jax.build import defaults, migration
from arcond_jax.config import Config, ConfigError

VERSION = 2


def dump(config: Config) -> dict[str, Any]:
    """The config as plain JSON, with the version of its layout."""
    return {"version": VERSION} | config.to_dict()


def load(saved: Mapping[str, Any]) -> Config:
    """The config of `dump`.

    Keys that are newer than the checkpoint get their default, which is what there was before them.

    Raises:
      ConfigError: It has keys this version does not know.
    """
    version = _version(saved)
    if version == 1:
        values = migration.config_of_version_1(saved)
        config = defaults.filled(values, **defaults.choices_of(values))
        for name in defaults.silent(config):
            del values[name.split(".")[0]][name.split(".")[1]]  # accepted then, refused now
        return defaults.filled(values, **defaults.choices_of(values))
    values = {name: x for name, x in saved.items() if name != "version"}
    config = defaults.filled(values, **defaults.choices_of(values))
    unknown = sorted(config_lib.flat(values).keys() - config_lib.flat(config).keys())
    if unknown:
        raise ConfigError(f"the saved config is of another version: it has {unknown[0]}")
    return config


def trees_then(
    saved: Mapping[str, Any], state: Any, tokenizer: Any, config: Config
) -> tuple[Any, Any]:
    """Shapes of a train state and a tokenizer as the version that saved them had them."""
    if _version(saved) > 1:
        return state, tokenizer
    return (
        migration.state_in_version_1(state, config),
        migration.tokenizer_in_version_1(tokenizer, saved),
    )


def trees_now(
    saved: Mapping[str, Any],
    restored: tuple[Any, Any],
    abstract: tuple[Any, Any],
    config: Config,
) -> tuple[Any, Any]:
    """What was restored into `trees_then`, as this version has it; `abstract` are its shapes."""
    if _version(saved) > 1:
        return restored
    return (
        migration.state_from_version_1(restored[0], abstract[0], config),
        migration.tokenizer_from_version_1(restored[1], abstract[1]),
    )


def _version(saved: Mapping[str, Any]) -> int:
    version = saved.get("version", 1)
    if version not in (1, VERSION):
        raise ConfigError(
            f"the saved config is of version {version}, this library knows up to {VERSION}: "
            "install a newer one"
        )
    return version
