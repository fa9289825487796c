"""Configs as checkpoints hold them, and the trees beside them, of this version and earlier ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from arcond_jax import config as config_lib
from arcond_jax.build import defaults, migration, training
from arcond_jax.config import Config, ConfigError

VERSION = 2


APART = ("version", "class_names", "tokenizer_sha256")  # what is saved beside the settings


def dump(
    config: Config,
    class_names: Sequence[str] | None = None,
    *,
    tokenizer_sha256: str | None = None,
) -> dict[str, Any]:
    """The config as plain JSON, with the version of its layout and the names of the labels.

    Args:
      tokenizer_sha256: Of the tokenizer of a run, which lies beside its checkpoints.
    """
    beside: dict[str, Any] = {"version": VERSION}
    if class_names is not None:
        beside["class_names"] = list(class_names)
    if tokenizer_sha256 is not None:
        beside["tokenizer_sha256"] = tokenizer_sha256
    return beside | config.to_dict()


def tokenizer_sha256(saved: Mapping[str, Any]) -> str | None:
    """What `dump` was told of the tokenizer; None where a checkpoint holds its own."""
    return saved.get("tokenizer_sha256")


def class_names(saved: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of the labels that `dump` was given; None where it was not."""
    names = saved.get("class_names")
    return None if names is None else tuple(names)


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
    values = {name: x for name, x in saved.items() if name not in APART}
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
    bank = jax.eval_shape(lambda: training.empty_bank(load(saved)))
    return (
        migration.state_in_version_1(state, config, bank=bank),
        migration.tokenizer_in_version_1(tokenizer, saved),
    )


def dropped(saved: Mapping[str, Any]) -> tuple[str, ...]:
    """Branches of a saved train state that are not read any more."""
    return ("bank",) if _version(saved) == 1 else ()


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
