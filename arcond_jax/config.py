"""Config files: how they are found and run, how settings are changed, how they are wrong.

What a config means is known to `build` alone.
"""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import runpy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

from arcond_jax import configs

if TYPE_CHECKING:  # what lies in a config is checked when it is read, not by its type
    Config = Any
else:
    Config = config_dict.ConfigDict


class ConfigError(ValueError):
    """A config that cannot be used: which key, why, and what would do."""


def read(path: str) -> Config:
    """Runs `path[:variant]`: a file, or the name of a config that comes with the library.

    Nothing else is run: a name is looked for in the package alone, wherever one is.

    Raises:
      ConfigError: no such file, name or variant, or a file that fails.
    """
    path, variant = _split(path)
    try:
        get_config = _get_config(path)
        if variant and not inspect.signature(get_config).parameters:
            raise ConfigError(f"{path} has no variants, so not {variant!r}")
        made = get_config(variant) if variant else get_config()
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:  # a config file is a program of the user's
        text = " ".join(str(error).split())
        raise ConfigError(f"{path} fails with {type(error).__name__}: {text}") from None
    if not isinstance(made, config_dict.ConfigDict):
        raise ConfigError(
            f"{path}: get_config returns {type(made).__name__}, not a config: end it with `return "
            "config`"
        )
    try:
        flat(made)
    except TypeError:  # names that cannot be sorted
        raise ConfigError(f"{path}: the names of settings must all be words") from None
    return made


def _split(text: str) -> tuple[str, str]:
    """Path and variant; a path may hold colons where a file of that name is there."""
    if pathlib.Path(text).expanduser().is_file():
        return text, ""
    if "://" in text:
        raise ConfigError(
            f"{text}: configs are read from files on this machine: copy it here and give its path"
        )
    name, _, variant = text.partition(":")
    if name in shipped():
        return name, variant
    path, _, variant = text.rpartition(":") if ":" in text else (text, "", "")
    return path, variant


def shipped() -> list[str]:
    """Names of the configs that come with the library; not of what several of them share."""
    files = [pathlib.Path(folder) for folder in configs.__path__]
    return sorted(
        path.stem
        for folder in files
        for path in folder.glob("*.py")
        if "def get_config(" in path.read_text("utf-8")
    )


def _get_config(path: str) -> Callable[..., Config]:
    if path in shipped():
        return importlib.import_module(f"{configs.__name__}.{path}").get_config
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"no config file {path}: give one, or the name of one that comes with the library: "
            f"{', '.join(shipped())}"
        )
    found = runpy.run_path(str(file)).get("get_config")
    if not callable(found):
        raise ConfigError(f"{path} has no function get_config: define one that returns the config")
    return found


@dataclasses.dataclass(frozen=True)
class Optional:
    """A value that may also be None."""

    kind: type
    value: Any


def made_of(sections: Mapping[str, Any]) -> Config:
    """A config of the given values, by section."""
    config = config_dict.ConfigDict()
    for name, value in sections.items():
        if isinstance(value, Mapping):
            config[name] = made_of(value)
        elif isinstance(value, Optional):
            config[name] = config_dict.FieldReference(value.value, field_type=value.kind)
        else:
            config[name] = value
    return config


def parse(text: str) -> tuple[str, Any]:
    """`section.key=value` as its two sides; a value that is no Python literal is a string."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value  # a bare word


def flat(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """All keys as `section.key`."""
    values = {}
    for name, value in config.items():
        if isinstance(value, config_dict.ConfigDict | Mapping):
            values |= {f"{name}.{inner}": x for inner, x in flat(value).items()}
        else:
            values[name] = value
    return values
