"""Official weights to a working directory that can be sampled from, and back.

A working directory of converted weights holds `weights/`: the parameters, the config they belong
to with the official sampling preset in its `sampling` section, and where they came from.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import flax.linen as nn
import jax

from arcond_jax import build, checkpoint, types
from arcond_jax.convert import files, kl16, mar, table


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one official repository.

    Attributes:
      configs: Shipped configs of the released sizes.
      rows: The table for a config.
      abstract: Shapes of the parameters for a config.
      ema, raw: Entries of a checkpoint under which the averaged and the last weights lie.
      ignored: Prefixes of names that are no weights of the model.
    """

    configs: tuple[str, ...]
    rows: Callable[[build.Config], list[table.Row]]
    abstract: Callable[[build.Config], types.Params]
    ema: tuple[str, ...]
    raw: tuple[str, ...]
    ignored: tuple[str, ...] = ()


def _model_shapes(config: build.Config) -> types.Params:
    return nn.unbox(jax.eval_shape(build.generator(config).init, jax.random.key(0)))


FAMILIES = {
    "mar": Family(
        configs=(
            "mar_base_imagenet256",
            "mar_large_imagenet256",
            "mar_huge_imagenet256",
            "mar_large_imagenet512",
        ),
        rows=lambda config: mar.rows(build.mar_network(config)),
        abstract=_model_shapes,
        ema=("model_ema",),
        raw=("model",),
    ),
    "kl16": Family(
        configs=("mar_base_imagenet256",),
        rows=lambda config: kl16.rows(build.kl_network(config)),
        abstract=lambda config: build.abstract_kl(config).params,
        ema=("model", "state_dict"),
        raw=("model", "state_dict"),
        ignored=kl16.IGNORED,
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
    state = files.load_state(source, containers=wanted, others=others, ignored=made.ignored)
    found = config or _matching_config(made, source, state)
    try:
        params = table.to_ours(made.rows(found), state, made.abstract(found))
    except table.ConvertError as error:
        raise table.ConvertError(f"{source}: {error}") from None
    if tokenizer is not None:
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
    if config.backbone != "mar":
        raise build.ConfigError(f"backbone {config.backbone} has no official format to export to")
    return config.backbone


def _matching_config(family: Family, source: pathlib.Path, state: table.StateDict) -> build.Config:
    shapes = {name: x.shape for name, x in state.items()}
    for name in family.configs:
        config = build.load_config(name)
        if table.their_shapes(family.rows(config), family.abstract(config)) == shapes:
            return config
    raise table.ConvertError(
        f"{source}: the weights fit none of {', '.join(family.configs)}: give their --config"
    )
