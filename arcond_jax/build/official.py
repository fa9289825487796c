"""What is known of the official weights of a model family or a tokenizer."""

import dataclasses
from collections.abc import Callable
from typing import Any

from arcond_jax.config import Config
from arcond_jax.convert import table


@dataclasses.dataclass(frozen=True)
class Official:
    """Official weights: their format, and the released sizes.

    Attributes:
      name: Of the format, `--family` of `arcond convert`.
      configs: Shipped configs of the released sizes.
      rows: The table of names for a network.
      ema, raw: Entries of a checkpoint under which the averaged and the last weights lie.
      container: Entries of a PyTorch file under which the official code looks for the weights, to
        export them; none where it reads a bare state dict.
      ignored: Prefixes of names that are no weights of the model.
      averaged: Picks the averages from a state dict that holds both kinds of weights.
      pixels: Edge of the images that weights are for, by the name of their file and the weights,
        where these tell. It tells apart sizes whose shapes are the same.
      fits: Whether the official code knows a model of such a config.
    """

    name: str
    configs: tuple[str, ...]
    rows: Callable[[Any], list[table.Row]]
    ema: tuple[str, ...] = ("model", "state_dict")
    raw: tuple[str, ...] = ("model", "state_dict")
    container: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    averaged: Callable[[list[table.Row], table.StateDict], table.StateDict] | None = None
    pixels: Callable[[str, table.StateDict], int | None] = lambda stem, state: None
    fits: Callable[[Config], bool] = lambda config: True
