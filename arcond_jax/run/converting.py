"""Official weights to a working directory that can be sampled from, and back.

A working directory of converted weights holds `weights/`: the parameters, the config they belong
to with the official sampling preset in its `sampling` section, and where they came from.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from etils import epath

from arcond_jax import build, checkpoint, types
from arcond_jax.build import models, tokens
from arcond_jax.build import saved as saved_lib
from arcond_jax.convert import files, shards, table


@dataclasses.dataclass(frozen=True)
class Format:
    """One official format.

    Attributes:
      official: What is known of it.
      tokenizer: `tokenizer.name` of a tokenizer's; None for a model's.
    """

    official: build.Official
    tokenizer: str | None = None

    def rows(self, config: build.Config) -> list[table.Row]:
        """The table for a config."""
        make = build.network if self.tokenizer is None else build.tokenizer_network
        return self.official.rows(make(config))

    def abstract(self, config: build.Config) -> types.Params:
        """Shapes of the parameters for a config."""
        if self.tokenizer is None:
            return nn.unbox(build.abstract_params(config))
        return build.abstract_tokenizer(config).params

    def selected(
        self, config: build.Config, held: table.StateDict, weights: str
    ) -> table.StateDict:
        """What of a state dict the table of a config is about."""
        if self.official.averaged is not None and weights == "ema":
            return self.official.averaged(self.rows(config), held)
        ignored = self.official.ignored
        return {name: x for name, x in held.items() if not name.startswith(ignored)}


def formats() -> Mapping[str, Format]:
    """All official formats by name."""
    of_models = [record.official for record in models.FAMILIES.values()]
    of_tokenizers = {name: record.official for name, record in tokens.TOKENIZERS.items()}
    return {x.name: Format(x) for x in of_models if x is not None} | {
        x.name: Format(x, tokenizer=name) for name, x in of_tokenizers.items() if x is not None
    }


def convert(
    name: str,
    source: pathlib.Path,
    out: epath.PathLike,
    *,
    config: build.Config | None = None,
    weights: str = "ema",
    tokenizer: epath.Path | None = None,
) -> build.Config:
    """Writes `out` from an official checkpoint; nothing is written unless all of it fits.

    Args:
      name: Of the format.
      source: A file, the index of its shards, or a folder with one of them.
      config: Of the model; None looks for the shipped config whose shapes are those of the weights.
      weights: "ema" or "raw".
      tokenizer: Folder of the converted tokenizer, noted in the config.

    Returns:
      The config that was written.

    Raises:
      table.ConvertError: The file cannot be read, or is of another model or size.
      checkpoint.CheckpointError: `out` holds weights already or cannot be written.
    """
    made, folder = formats()[name], epath.Path(out) / tokens.WEIGHTS
    if folder.exists():
        raise checkpoint.CheckpointError(f"{out} holds weights already: use another directory")
    wanted, others = made.official.ema, made.official.raw
    if weights == "raw":
        wanted, others = others, wanted
    held = files.load_state(source, containers=wanted, others=others)
    weights_at = shards.find(source)
    stems = f"{source.stem} {weights_at.stem}" if source.is_dir() else source.stem
    pixels = made.official.pixels(stems, held)
    if config is not None and pixels not in (None, config.data.image_size):
        raise table.ConvertError(
            f"{source}: the weights are for images of {pixels} pixels, config {config.name} for "
            f"{config.data.image_size}: take the config of that size"
        )
    try:
        found = config or _matching_config(made, held, weights, pixels)
        params = table.to_ours(
            made.rows(found), made.selected(found, held, weights), made.abstract(found)
        )
    except table.ConvertError as error:
        raise table.ConvertError(f"{source}: {error}") from None
    if tokenizer is not None:
        _check_tokenizer(found, tokenizer)
        found = build.changed(found, {"tokenizer.path": _absolute(tokenizer)})
    metadata = {
        "config": saved_lib.dump(found),
        "family": name,
        "weights": weights,
        "source": source.absolute().name,
        "source_sha256": files.digest(shards.files_of(weights_at)),  # of shards, one after another
    }
    checkpoint.save_tree(str(folder), {"params": params}, metadata)
    return found


def export(name: str, params: types.Params, config: build.Config, target: pathlib.Path) -> None:
    """Writes parameters for PyTorch, under the entries that the official code reads.

    Raises:
      table.ConvertError: The ending is not of a format of weights, or the file cannot be written.
    """
    made = formats()[name]
    state = table.to_theirs(made.rows(config), params)
    files.save_state(target, state, containers=made.official.container)


def format_of(config: build.Config) -> str:
    """Name of the official format of a config's model.

    Raises:
      build.ConfigError: It has no official counterpart.
    """
    official = build.family_of(config).official
    if official is None or not official.fits(config):
        raise build.ConfigError(
            f"config {config.name} of model {config.model.name} has no official format to export to"
        )
    return official.name


def _matching_config(
    made: Format, held: table.StateDict, weights: str, pixels: int | None
) -> build.Config:
    """The shipped config whose shapes are those of the weights."""
    fitting = []
    for name in made.official.configs:
        config = build.load_config(name)
        try:
            state = made.selected(config, held, weights)
        except table.ConvertError:  # averages of another size
            continue
        shapes = {key: x.shape for key, x in state.items()}
        if table.their_shapes(made.rows(config), made.abstract(config)) == shapes:
            fitting.append(config)
    if len(fitting) > 1:
        fitting = [c for c in fitting if c.data.image_size == pixels] or fitting
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(c.name for c in fitting) or f"none of {', '.join(made.official.configs)}"
    raise table.ConvertError(f"the weights fit {names}: give their --config")


def _check_tokenizer(config: build.Config, folder: epath.Path) -> None:
    """Codes or latents of another tokenizer would be read as noise."""
    known: dict[str, Any] = checkpoint.load_metadata(f"{folder}/{tokens.WEIGHTS}")
    family = str(known.get("family"))
    if family not in formats() or formats()[family].tokenizer != config.tokenizer.name:
        raise build.ConfigError(
            f"{folder} holds {family}, the model {config.name} needs a tokenizer "
            f"{config.tokenizer.name}"
        )
    saved = saved_lib.load(known["config"]).tokenizer
    for key, value in config.tokenizer.items():
        if key not in ("path", "patch_size") and saved[key] != value:
            raise build.ConfigError(
                f"{folder} holds a tokenizer with tokenizer.{key} {saved[key]}, the model "
                f"{config.name} needs {value}"
            )


def _absolute(folder: epath.Path) -> str:
    return str(folder if "://" in str(folder) else folder.resolve())
