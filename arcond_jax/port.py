"""Official weights to a working directory that can be sampled from, and back.

A working directory of converted weights holds `weights/`: the parameters, the config they belong
to with the official sampling preset in its `sampling` section, and where they came from.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from arcond_jax import build, checkpoint, types
from arcond_jax import config as config_lib
from arcond_jax.convert import (
    files,
    kl16,
    lfq,
    llamagen,
    magvit2,
    mar,
    maskgit_vq,
    rar,
    table,
    vq16,
)
from arcond_jax.models import captioned

LLAMAGEN_SIZES = ("b", "l", "xl", "xxl", "3b")
LLAMAGEN_PREFIXES = {"llamagen": 1, "llamagen_t2i": captioned.NUM_PREFIX}  # places before the grid


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one official repository.

    Attributes:
      configs: Shipped configs of the released sizes.
      rows: The table for a config.
      abstract: Shapes of the parameters for a config.
      ema, raw: Entries of a checkpoint under which the averaged and the last weights lie.
      ignored: Prefixes of names that are no weights of the model.
      kind: "model", or the `tokenizer.name` of the configs that use it.
      averaged: Picks the averages from a state dict that holds both kinds of weights.
    """

    configs: tuple[str, ...]
    rows: Callable[[build.Config], list[table.Row]]
    abstract: Callable[[build.Config], types.Params]
    ema: tuple[str, ...] = ("model", "state_dict")
    raw: tuple[str, ...] = ("model", "state_dict")
    ignored: tuple[str, ...] = ()
    kind: str = "model"
    averaged: Callable[[list[table.Row], table.StateDict], table.StateDict] | None = None


def _model_shapes(config: build.Config) -> types.Params:
    return nn.unbox(build.abstract_params(config))


def _tokenizer_shapes(config: build.Config) -> types.Params:
    return build.abstract_trained(config).params


def _model(rows: Callable[[Any], list[table.Row]], configs: tuple[str, ...], **more: Any) -> Family:
    return Family(configs, lambda config: rows(build.network(config)), _model_shapes, **more)


def _tokenizer(
    kind: str, rows: Callable[[Any], list[table.Row]], *variants: str, **more: Any
) -> Family:
    return Family(
        tuple(f"tokenizers:{variant}" for variant in variants),
        lambda config: rows(build.tokenizer_network(config)),
        _tokenizer_shapes,
        kind=kind,
        **more,
    )


FAMILIES = {
    "mar": _model(
        mar.rows,
        (
            "mar_base_imagenet256",
            "mar_large_imagenet256",
            "mar_huge_imagenet256",
            "mar_large_imagenet512",
        ),
        ema=("model_ema",),
        raw=("model",),
    ),
    "llamagen": _model(
        llamagen.rows,
        tuple(f"llamagen_{size}_{pixels}" for pixels in (256, 384) for size in LLAMAGEN_SIZES),
        ema=("model", "module", "state_dict"),
        raw=("model", "module", "state_dict"),
        ignored=llamagen.IGNORED,
    ),
    "llamagen_t2i": _model(
        llamagen.captioned_rows,
        ("llamagen_t2i_xl_256", "llamagen_t2i_xl_512"),
        ema=("model", "module", "state_dict"),
        raw=("model", "module", "state_dict"),
        ignored=llamagen.IGNORED,
    ),
    "rar": _model(rar.rows, ("rar_b", "rar_l", "rar_xl", "rar_xxl")),
    "magvit2": _model(
        lambda network: magvit2.rows(network, magvit2.PREFIX),
        ("magvit2_b", "magvit2_l", "magvit2_xl"),
        ignored=magvit2.IGNORED,
    ),
    "kl16": _tokenizer("kl", kl16.rows, "kl16", ignored=kl16.IGNORED),
    "vq": _tokenizer("vq", vq16.rows, "vq16", "vq8", ignored=vq16.IGNORED),
    "maskgit_vq": _tokenizer("maskgit_vq", maskgit_vq.rows, "maskgit_vq"),
    "lfq": _tokenizer(
        "lfq", lfq.rows, "lfq256", "lfq128", ignored=lfq.IGNORED, averaged=lfq.averaged
    ),
}


def convert(
    family: str,
    source: pathlib.Path,
    out: pathlib.Path,
    *,
    config: build.Config | None = None,
    weights: str = "ema",
    tokenizer: pathlib.Path | None = None,
) -> build.Config:
    """Writes `out` from an official checkpoint; nothing is written unless all of it fits.

    Args:
      config: Of the model; None looks for the shipped config whose shapes are those of the weights.
      weights: "ema" or "raw".
      tokenizer: Folder of the converted tokenizer, noted in the config.

    Returns:
      The config that was written.

    Raises:
      table.ConvertError: The file cannot be read, or is of another model or size.
      checkpoint.CheckpointError: `out` holds weights already or cannot be written.
    """
    made = FAMILIES[family]
    if (out / build.WEIGHTS).exists():
        raise checkpoint.CheckpointError(f"{out} holds weights already: use another directory")
    wanted, others = (made.ema, made.raw) if weights == "ema" else (made.raw, made.ema)
    held = files.load_state(source, containers=wanted, others=others)
    _check_pixels(family, source, held, config)
    try:
        found = config or _matching_config(family, source, held, weights)
        params = table.to_ours(
            made.rows(found), _selected(family, found, held, weights), made.abstract(found)
        )
    except table.ConvertError as error:
        raise table.ConvertError(f"{source}: {error}") from None
    if tokenizer is not None:
        _check_tokenizer(found, tokenizer)
        found.tokenizer.path = str(tokenizer.absolute())
    metadata = {
        "config": found.to_dict(),
        "family": family,
        "weights": weights,
        "source": source.name,
        "source_sha256": files.digest(source),
    }
    checkpoint.save_tree(str(out / build.WEIGHTS), {"params": params}, metadata)
    return found


def export(family: str, params: types.Params, config: build.Config, target: pathlib.Path) -> None:
    """Writes parameters as an official state dict, for PyTorch."""
    files.save_state(target, table.to_theirs(FAMILIES[family].rows(config), params))


def family_of(config: build.Config) -> str:
    """The family whose table describes the model of a config.

    Raises:
      build.ConfigError: It has no official counterpart.
    """
    alone = config.loss.w_diffusion == 0 and config.tensorar.window == 1
    if config.backbone == "gpt" and alone and not config.gpt.qk_norm:
        return "llamagen"
    if config.backbone == "captioned" and not config.gpt.qk_norm:
        return "llamagen_t2i"
    if config.backbone not in ("mar", "rar", "magvit2"):
        raise build.ConfigError(
            f"config {config.name} of backbone {config.backbone} has no official format to export "
            "to"
        )
    return config.backbone


def _selected(
    family: str, config: build.Config, held: table.StateDict, weights: str
) -> table.StateDict:
    """What of a state dict the table of a config is about."""
    made = FAMILIES[family]
    if made.averaged is not None and weights == "ema":
        return made.averaged(made.rows(config), held)
    return {name: x for name, x in held.items() if not name.startswith(made.ignored)}


def _matching_config(
    family: str, source: pathlib.Path, held: table.StateDict, weights: str
) -> build.Config:
    """The shipped config whose shapes are those of the weights.

    Where weights for two image sizes have the same shapes, the name of the file decides, as
    released files name the size.
    """
    made, fitting = FAMILIES[family], []
    for name in made.configs:
        config = build.load_config(name)
        try:
            state = _selected(family, config, held, weights)
        except table.ConvertError:  # averages of another size
            continue
        shapes = {key: x.shape for key, x in state.items()}
        if table.their_shapes(made.rows(config), made.abstract(config)) == shapes:
            fitting.append(config)
    if len(fitting) > 1:
        pixels = _pixels(family, source, held)
        fitting = [c for c in fitting if c.data.image_size == pixels] or fitting
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(c.name for c in fitting) or f"none of {', '.join(made.configs)}"
    raise table.ConvertError(f"the weights fit {names}: give their --config")


def _pixels(family: str, source: pathlib.Path, held: table.StateDict) -> int | None:
    """Edge of the images that LlamaGen's weights are for, where the file tells; else None.

    By the table of positions that early checkpoints hold, or by the name.
    """
    if family not in LLAMAGEN_PREFIXES:
        return None
    positions = held.get(llamagen.POSITIONS)
    if positions is not None:
        return llamagen.STRIDE * math.isqrt(len(positions) - LLAMAGEN_PREFIXES[family])
    named = [size for size in (256, 384, 512) if str(size) in source.stem]
    return named[0] if len(named) == 1 else None


def _check_pixels(
    family: str, source: pathlib.Path, held: table.StateDict, config: build.Config | None
) -> None:
    pixels = _pixels(family, source, held)
    if config is not None and pixels not in (None, config.data.image_size):
        raise table.ConvertError(
            f"{source}: the weights are for images of {pixels} pixels, config {config.name} for "
            f"{config.data.image_size}: take the config of that size"
        )


def _check_tokenizer(config: build.Config, folder: pathlib.Path) -> None:
    """Codes or latents of another tokenizer would be read as noise."""
    known = checkpoint.load_metadata(str(folder / build.WEIGHTS))
    family, name = known["family"], config.tokenizer.name
    if FAMILIES[family].kind != name:
        raise build.ConfigError(
            f"{folder} holds {family}, the model {config.name} needs a tokenizer {name}"
        )
    saved = config_lib.from_dict(known["config"])[name]
    for key, value in config[name].items():
        if saved[key] != value:
            raise build.ConfigError(
                f"{folder} holds a tokenizer with {name}.{key} {saved[key]}, the model "
                f"{config.name} needs {value}"
            )
