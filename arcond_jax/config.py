"""Config files: how they are found and run, how settings are changed, how they are wrong.

What a config means is known to `build` alone.
"""

import ast
import difflib
import pathlib
import runpy
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

if TYPE_CHECKING:  # what lies in a config is checked when it is read, not by its type
    Config = Any
else:
    Config = config_dict.ConfigDict


class ConfigError(ValueError):
    """A config that cannot be used: which key, why, and what would do."""


def read(path: str) -> Config:
    """Reads `path[:variant]`.

    A path that does not exist is looked for among the configs that come with the library.

    Raises:
      ConfigError: no such file or variant, or a file that fails.
    """
    path, _, variant = path.partition(":")
    try:
        return _run_file(_find_file(path), variant)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # a config file is a program of the user's
        raise ConfigError(f"{path} fails with {type(error).__name__}: {error}") from None


def _run_file(path: pathlib.Path, variant: str) -> Config:
    root = str(path.parent.parent)
    sys.path.insert(0, root)  # config files import each other as `configs.<name>`
    try:
        get_config = runpy.run_path(str(path))["get_config"]
        return get_config(variant) if variant else get_config()
    finally:
        sys.path.remove(root)


def _find_file(path: str) -> pathlib.Path:
    package = pathlib.Path(__file__).parent
    name = path if path.endswith(".py") else f"{path}.py"
    shipped = [place / "configs" / pathlib.Path(name).name for place in (package.parent, package)]
    for candidate in [pathlib.Path(name), *shipped]:
        if candidate.is_file():
            return candidate.resolve()
    there = sorted(p.stem for place in shipped for p in place.parent.glob("*.py"))
    raise ConfigError(f"no config file {path}: the library comes with {', '.join(there)}")


def override(config: Config, text: str) -> None:
    """Applies one `section.key=value` in place.

    Raises:
      ConfigError: an unknown key or a value of the wrong type.
    """
    name, _, text = text.partition("=")
    *sections, leaf = name.split(".")
    section: Any = config
    for part in sections:
        section = section.get(part) if isinstance(section, config_dict.ConfigDict) else None
    if not isinstance(section, config_dict.ConfigDict) or leaf not in section:
        known = list(flat(config))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(config)}"
        raise ConfigError(f"unknown config key {name}: {hint}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text  # a bare word is a string
    expected = section.get_type(leaf)
    if expected is float and type(value) is int:
        value = float(value)
    # Placeholders, and only they, may be None.
    fields = dict(section.items(preserve_field_references=True))
    optional = isinstance(fields[leaf], config_dict.FieldReference)
    if type(value) is not expected and not (value is None and optional):
        wanted = expected.__name__ + (" or None" if optional else "")
        raise ConfigError(f"config key {name} wants {wanted}, not {text!r}")
    section[leaf] = value


def from_dict(saved: Mapping[str, Any]) -> Config:
    """The config of `to_dict`, as a checkpoint holds it.

    Keys that are newer than the checkpoint get their default, which is what there was before them.

    Raises:
      ConfigError: It has keys this version does not know.
    """
    config = _run_file(_find_file("base"), "")
    values = flat(config_dict.ConfigDict(saved))
    unknown = sorted(values.keys() - flat(config).keys())
    if unknown:
        raise ConfigError(f"the saved config is of another version: it has {unknown[0]}")
    config.update_from_flattened_dict(values)
    return config


def flat(config: Config) -> dict[str, Any]:
    """All keys as `section.key`."""
    values = {}
    for name, value in config.items():
        if isinstance(value, config_dict.ConfigDict):
            values |= {f"{name}.{inner}": x for inner, x in flat(value).items()}
        else:
            values[name] = value
    return values
