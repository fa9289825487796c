"""Refinement of conditions: which kinds there are, what each is told, and its bank."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from arcond_jax import types
from arcond_jax.build import family, keys
from arcond_jax.config import Config, ConfigError
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import bures, entropic, refiners, residual
from arcond_jax.transport import inverse as inverse_lib
from arcond_jax.transport import options as options_lib

MAX_BANK_BYTES = 2**35  # the bank is whole on every device

BANK = {
    "grouping": keys.choice("class", ("class", "shared")),
    "num_atoms": keys.integer(128),
}
STEP = {"tau": keys.number(1.0, low=0.0, high=1e12), "num_jko_steps": keys.integer(1)}
ENTROPIC = {
    "epsilon": keys.positive(0.1),
    "debias": keys.flag(True),
    "num_sinkhorn_iters": keys.integer(60),
    "max_move": keys.positive(3.0),
}
ROLLOUT = {"num_sources": keys.integer(100)}  # rows of each group in a calibration, 2 or more
INVERSE = {"inverse_weight": keys.weight(0.0)}


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of refinement.

    Attributes:
      section: Settings besides its name.
      bank: An empty bank for a config, slots and groups; None without one.
      maps: What is fitted in a rollout; None if nothing is.
      unfitted: The refiner of a kind that needs no rollout, given the bank.
    """

    section: keys.Section
    bank: Callable[[Config, family.Conditions, int], Any] | None = None
    maps: refiners.Maps | None = None
    unfitted: Callable[[Any, options_lib.RefineOptions], types.Refiner] | None = None


def _bank(config: Config, conditions: family.Conditions, num_groups: int) -> bank_lib.Bank:
    transport, num_slots, width = config.transport, conditions.num_slots, conditions.width
    num_bytes = 4 * num_slots * num_groups * transport.num_atoms * width
    if num_bytes > MAX_BANK_BYTES:
        raise ConfigError(
            f"transport.kind {transport.kind} would keep {num_bytes / 2**30:,.0f} GiB of "
            f"conditions, for {num_slots} slots and {num_groups} groups: use transport.kind="
            "residual, transport.grouping=shared or fewer transport.num_atoms"
        )
    return bank_lib.init_bank(num_slots, num_groups, num_atoms=transport.num_atoms, width=width)


def _residual_bank(
    config: Config, conditions: family.Conditions, num_groups: int
) -> residual.ResidualBank:
    return residual.init_bank(
        conditions.num_slots,
        num_groups,
        num_atoms=config.transport.num_atoms,
        num_directions=min(config.transport.num_directions, conditions.width),
        width=conditions.width,
    )


KINDS: Mapping[str, Kind] = {
    "none": Kind({}, unfitted=lambda bank, options: refiners.Identity()),
    "stored": Kind(
        BANK | ROLLOUT | STEP | ENTROPIC | INVERSE, bank=_bank, maps=entropic.PerGroup()
    ),
    "bures": Kind(BANK | ROLLOUT | STEP | INVERSE, bank=_bank, maps=bures.Gaussian()),
    "residual": Kind(
        BANK
        | {"num_directions": keys.integer(64)}  # at most
        | ROLLOUT
        | STEP
        | ENTROPIC
        | INVERSE,
        bank=_residual_bank,
        maps=residual.Residual(),
    ),
    "in_batch": Kind(
        BANK | STEP | ENTROPIC,
        bank=_bank,
        unfitted=lambda bank, options: refiners.InBatch(bank, options=options),
    ),
}


def kind_of(config: Config) -> Kind:
    """The record of the config's refinement."""
    return KINDS[config.transport.kind]


def options(config: Config) -> options_lib.RefineOptions:
    """Static choices of the refinement, those that the kind has."""
    names = {field.name for field in dataclasses.fields(options_lib.RefineOptions)}
    chosen = {name: value for name, value in config.transport.items() if name in names}
    return options_lib.RefineOptions(**chosen)


def empty_bank(config: Config, conditions: family.Conditions | None) -> Any:
    """A bank with a slot per condition of a row, and a group per class or for all.

    None without refinement.

    Raises:
      ConfigError: It would not fit a device.
    """
    make = kind_of(config).bank
    if make is None or conditions is None:
        return None
    shared = config.transport.grouping == "shared"
    return make(config, conditions, 1 if shared else config.data.num_classes)


def calibrator(
    config: Config, bank: Any, inverse: inverse_lib.Inverse | None = None
) -> refiners.Calibrator:
    """What fits the config's maps in a rollout."""
    maps = kind_of(config).maps
    assert maps is not None
    return refiners.Calibrator(
        bank,
        inverse=inverse,
        options=options(config),
        grouping=config.transport.grouping,
        kind=maps,
    )


def check(config: Config, conditions: family.Conditions | None) -> None:
    """Raises ConfigError if the model has no conditions of the kind that refinement needs."""
    name, kind = config.model.name, config.transport.kind
    if conditions is None and kind != "none":
        raise ConfigError(
            f"transport.kind {kind} needs a condition for each token and images of each class, "
            f"which model {name} has not: set it to none"
        )
    inverse_weight = config.transport.get("inverse_weight", 0.0)
    if conditions is not None and inverse_weight and not conditions.one_by_one:
        raise ConfigError(
            f"transport.inverse_weight {inverse_weight} needs one condition after the other in "
            f"each row, and model {name} draws several at once: set it to 0"
        )
