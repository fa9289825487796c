"""The refiner of a run: a bank of its conditions, maps fitted to its sampler, kept on disk."""

import dataclasses
import functools
import logging
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from arcond_jax import build, checkpoint, sharding, types
from arcond_jax import config as config_lib
from arcond_jax.data import pipeline
from arcond_jax.models import dit
from arcond_jax.run import drawing
from arcond_jax.run.restoring import Trained
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import inverse, refiners, residual

IMAGES_PER_ATOM = 8  # read to fill a bank, at most: a group's ring is then full whatever the order
IMAGES_PER_MEAN = 200  # of each class, read for the moments in a bank of residuals, at most
CONDITIONS_SEED = 0  # of the orders in which MAR's conditions are met
CONDITIONS_BATCH = 128
CALIBRATION_SEED = 1000  # apart from the small seeds people sample with


def conditions(
    trained: Trained, split: str, *, at_most: int | None = None
) -> tuple[Float[np.ndarray, "n s d"], Int[np.ndarray, " n"]]:
    """Teacher-forced conditions of a split in its order, and its labels.

    Args:
      at_most: Images to take, spread over the split; None takes all.
    """
    conds, labels = [], []
    for cond, label, valid in _condition_batches(trained, split, at_most=at_most):
        conds.append(np.asarray(cond)[valid])
        labels.append(label[valid])
    return np.concatenate(conds), np.concatenate(labels)


def _condition_batches(
    trained: Trained, split: str, *, at_most: int | None
) -> Iterator[tuple[Float[jax.Array, "b s d"], Int[np.ndarray, " b"], Bool[np.ndarray, " b"]]]:
    """Conditions on the device, labels, and which rows count."""
    generator = build.generator(trained.config, trained.tokenizer)
    if isinstance(generator, dit.Generator):
        raise build.ConfigError("backbone dit has one condition for all tokens, and none per token")

    def run(params, tokenizer, image, label, rng):
        return generator.conditions(params, tokenizer.encode(image), label, rng)

    run = sharding.on_mesh(run, trained.mesh)
    source = build.source(trained.config, split)
    batches = pipeline.full_batches(source, CONDITIONS_BATCH, at_most=at_most)
    for number, batch in enumerate(batches):
        placed = sharding.put_batch({k: batch[k] for k in ("image", "label")}, trained.mesh)
        rng = jax.random.fold_in(jax.random.key(CONDITIONS_SEED), number)
        cond = run(trained.params, trained.tokenizer, placed["image"], placed["label"], rng)
        yield cond, batch["label"], batch["valid"]


def filled_bank(trained: Trained) -> bank_lib.Bank | residual.ResidualBank:
    """A bank of the training set's conditions under the averaged parameters, in one pass or two.

    Conditions drift while the network trains, so what counts is how they are at the end.
    """
    bank = build.empty_bank(trained.config)
    if bank is None:
        raise build.ConfigError("transport.kind is none, and without refinement there is no bank")
    num_groups = bank.count.shape[1]
    if isinstance(bank, residual.ResidualBank):
        return _residual_bank(trained, bank)
    enough = IMAGES_PER_ATOM * trained.config.transport.num_atoms * num_groups
    cond, label = conditions(trained, "train", at_most=enough)
    group = jnp.zeros_like(label) if num_groups == 1 else jnp.asarray(label)
    update = sharding.on_mesh(bank_lib.update_bank, trained.mesh)
    return update(bank, jnp.asarray(cond), group=group)


def _residual_bank(trained: Trained, empty: residual.ResidualBank) -> residual.ResidualBank:
    """Means and directions from many images, one batch in memory at a time; then the atoms."""
    num_groups = empty.count.shape[1]
    add = sharding.on_mesh(residual.add, trained.mesh, static_argnames="num_groups")
    moments = None
    enough = IMAGES_PER_MEAN * trained.config.data.num_classes
    for cond, label, valid in _condition_batches(trained, "train", at_most=enough):
        group = np.where(valid, 0 if num_groups == 1 else label, num_groups)
        moments = add(moments, cond, group=group, num_groups=num_groups)
    num_atoms = empty.atoms.shape[1]
    cond, label = conditions(trained, "train", at_most=num_atoms)
    again = np.arange(num_atoms) % len(cond)  # where there are fewer images than atoms
    make = sharding.on_mesh(
        functools.partial(residual.make_bank, num_directions=empty.basis.shape[2]), trained.mesh
    )
    return make(moments, jnp.asarray(cond[again]), group=label[again] * (num_groups > 1))


def calibrate(trained: Trained, config: build.Config | None = None) -> types.Refiner:
    """Makes the refiner that a config asks for, fitted to the sampler of the same config.

    One rollout with equally many rows for every group: at each slot the maps are fitted to the
    conditions that sampling reaches, which depend on the sampler's own settings. The bank is filled
    first if there is none that fits the config.
    """
    trained = dataclasses.replace(trained, config=config or trained.config)
    kind = trained.config.transport.kind
    if kind == "none":
        return refiners.Identity()
    bank = _fitting_bank(trained)
    if kind == "in_batch":
        assert isinstance(bank, bank_lib.Bank)
        return refiners.InBatch(bank, options=build.refine_options(trained.config))
    calibrator, label = _calibrator(trained, bank)
    _, sampled = drawing.Drawer(trained)(calibrator, label, seed=CALIBRATION_SEED)
    return calibrator.finish(sampled.refiner_state)


def _fitting_bank(trained: Trained) -> bank_lib.Bank | residual.ResidualBank:
    """The stored bank, or one filled now if that is empty or has other slots, groups or atoms."""
    wanted, bank = jax.eval_shape(lambda: build.empty_bank(trained.config)), trained.bank
    shapes, found = ([x.shape for x in jax.tree.leaves(tree)] for tree in (wanted, bank))
    if bank is not None and found == shapes and int(bank.count.min()) > 0:
        return bank
    logging.info("filling the bank of ideal conditions from the training split")
    return filled_bank(trained)


def _calibrator(
    trained: Trained, bank: bank_lib.Bank | residual.ResidualBank
) -> tuple[refiners.Calibrator, Int[np.ndarray, " n"]]:
    """The calibrator of the config, and the labels of its rollout."""
    config = trained.config
    options = build.refine_options(config)
    operators = None
    if options.inverse_weight:
        if config.backbone == "mar":
            raise build.ConfigError(
                "transport.inverse_weight needs one condition after the other in each row, and mar "
                "draws several at once: set it to 0"
            )
        operators = inverse.fit_inverse(jnp.asarray(conditions(trained, "train")[0]))
    calibrator = refiners.Calibrator(
        bank,
        inverse=operators,
        options=options,
        grouping=config.transport.grouping,
        kind=config.transport.kind,
    )
    num_rows = bank.count.shape[1] * config.transport.num_sources
    label = np.arange(num_rows) * config.data.num_classes // num_rows  # class-major, evenly
    return calibrator, label


def save_refiner(
    trained: Trained, workdir: pathlib.Path, config: build.Config, refiner: types.Refiner
) -> None:
    """Writes a calibrated refiner with the settings it holds for, in place of an earlier one."""
    directory = workdir / "refiner"
    if directory.exists():
        shutil.rmtree(directory)
    checkpoint.save_tree(str(directory), refiner, _refiner_settings(trained, config))


def load_refiner(trained: Trained, workdir: pathlib.Path, config: build.Config) -> types.Refiner:
    """Reads what `save_refiner` wrote.

    Raises:
      build.ConfigError: None there, or it was calibrated for another sampler.
      checkpoint.CheckpointError: It is damaged.
    """
    directory = workdir / "refiner"
    if config.transport.kind in ("none", "in_batch"):
        return calibrate(trained, config)  # nothing is fitted
    if not directory.exists():
        raise build.ConfigError(
            f"{workdir} has no calibrated refiner: run `arcond calibrate --checkpoint {workdir}` "
            "with the same settings, or set transport.kind=none"
        )
    wanted = _refiner_settings(trained, config)
    # Keys newer than the refiner have their default, as in a config.
    saved = _refiner_settings(trained, config_lib.from_dict({}))
    saved |= checkpoint.load_metadata(str(directory))
    for name, value in wanted.items():
        if saved[name] != value:
            raise build.ConfigError(
                f"the refiner in {workdir} was calibrated with {name}={saved[name]}, not "
                f"{value}: the conditions depend on it, so run `arcond calibrate` again"
            )
    bank = jax.eval_shape(lambda: build.empty_bank(config))
    trained = dataclasses.replace(trained, config=config)
    calibrator, label = _calibrator(trained, bank)

    def fitted(bank):
        filled = dataclasses.replace(calibrator, bank=bank)
        return filled.finish(filled.init(jnp.asarray(label)))

    shapes = jax.eval_shape(fitted, bank)
    whole = sharding.replicated(trained.mesh)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
    )
    return checkpoint.load_tree(str(directory), abstract)


def _refiner_settings(trained: Trained, config: build.Config) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in config_lib.flat(config).items()
        if name.split(".")[0] in ("sampling", "transport")
    }
    return {"checkpoint step": trained.step} | settings
