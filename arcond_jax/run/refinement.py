"""The refiner of a run: a bank of its conditions, maps fitted to its sampler, kept on disk."""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from arcond_jax import build, checkpoint, types
from arcond_jax import config as config_lib
from arcond_jax.build import defaults, migration
from arcond_jax.build import transport as transport_lib
from arcond_jax.data import pipeline
from arcond_jax.parallel import compiled, processes, stalling
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.run import drawing, restoring
from arcond_jax.run.restoring import Trained
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import inverse, refiners

CONDITIONS_SEED = 0  # of the orders in which MAR's conditions are met
CONDITIONS_BATCH = 128
CALIBRATION_SEED = 1000  # apart from the small seeds people sample with
# Of the rollout; the refiner is then right for either way of drawing, as both have one law.
WITHOUT_SPECULATION = {"sampling.speculative": False, "sampling.relaxed_acceptance": 1.0}


def conditions(
    trained: Trained, split: str, *, at_most: int | None = None
) -> tuple[Float[np.ndarray, "n s d"], Int[np.ndarray, " n"]]:
    """Teacher-forced conditions of a split in its order, and its labels.

    Args:
      at_most: Images to take, spread over the split; None takes all.
    """
    return bank_lib.collect(_condition_batches(trained, split, at_most=at_most))


def _condition_batches(
    trained: Trained, split: str, *, at_most: int | None
) -> Iterator[bank_lib.Batch]:
    """Conditions on the device, labels, and which rows count."""
    needed = build.conditions(trained.config)
    if needed is None:
        name = trained.config.model.name
        raise build.ConfigError(f"model {name} has no condition for each token")
    generator = build.generator(trained.config, trained.tokenizer)

    def run(params, tokenizer, batch, rng):
        tokens = build.tokens_of(tokenizer, batch)
        return generator.conditions(params, tokens, batch.prompt, rng, **needed.arguments)

    # Whole where a process has not all devices, so that each can bring the conditions to its host.
    whole = {"out_shardings": mesh_lib.replicated(trained.mesh)} if processes.are_several() else {}
    run = compiled.Compiled(run, trained.mesh, **whole)
    source = build.examples(trained.config, split)
    batch_size = mesh_lib.spread_over(trained.mesh, CONDITIONS_BATCH)
    batches = pipeline.full_batches(
        source,
        batch_size,
        at_most=at_most,
        rows=processes.local_rows(trained.mesh, batch_size),
        num_threads=trained.config.data.num_threads,
    )
    for number, batch in enumerate(batches):
        placed = processes.put_batch(types.batch_of(batch, batch["label"]), trained.mesh)
        counted = processes.put_batch(batch["valid"], trained.mesh)
        rng = jax.random.fold_in(jax.random.key(CONDITIONS_SEED), number)
        cond = run(trained.params, trained.tokenizer, placed, rng)
        stalling.ended()
        yield cond, *processes.fetch((placed.prompt, counted))


def filled_bank(trained: Trained) -> Any:
    """A bank of the training set's conditions under the averaged parameters, in one pass or two.

    Conditions drift while the network trains, so what counts is how they are at the end.
    """
    bank = build.empty_bank(trained.config)
    if bank is None:
        raise build.ConfigError("transport.kind is none, and without refinement there is no bank")
    return bank.fill(
        lambda at_most: _condition_batches(trained, "train", at_most=at_most),
        functools.partial(compiled.Compiled, mesh=trained.mesh),
        num_classes=trained.config.data.num_classes,
    )


def calibrate(trained: Trained, config: build.Config | None = None) -> types.Refiner:
    """Makes the refiner that a config asks for, fitted to the sampler of the same config.

    One rollout with equally many rows for every group: at each slot the maps are fitted to the
    conditions that sampling reaches, which depend on the sampler's own settings. It goes without
    speculation, under which rows do not reach a slot together. The bank is filled first if there is
    none that fits the config.
    """
    trained = dataclasses.replace(trained, config=config or trained.config)
    if trained.config.sampling.get("speculative"):
        without = build.changed(trained.config, WITHOUT_SPECULATION)
        trained = dataclasses.replace(trained, config=without)
    kind = transport_lib.kind_of(trained.config)
    bank = None if kind.bank is None else _fitting_bank(trained)
    if kind.unfitted is not None:
        return kind.unfitted(bank, transport_lib.options(trained.config))
    operators = None
    if trained.config.transport.inverse_weight:
        operators = inverse.fit_inverse(jnp.asarray(conditions(trained, "train")[0]))
    calibrator, label = _calibrator(trained.config, bank, operators)
    with stalling.longer():
        sampled = drawing.Drawer(trained).sample(calibrator, label, seed=CALIBRATION_SEED)
        return calibrator.finish(sampled.refiner_state)


def _fitting_bank(trained: Trained) -> Any:
    """The stored bank, or one filled now if that is empty or has other slots, groups or atoms."""
    wanted, bank = jax.eval_shape(lambda: build.empty_bank(trained.config)), trained.bank
    shapes, found = ([x.shape for x in jax.tree.leaves(tree)] for tree in (wanted, bank))
    if bank is not None and found == shapes:
        return bank
    logging.info("filling the bank of ideal conditions from the training split")
    return filled_bank(trained)


def _calibrator(
    config: build.Config, bank: Any, operators: inverse.Inverse | None
) -> tuple[refiners.Calibrator, Int[np.ndarray, " n"]]:
    """The calibrator of the config, and the labels of its rollout."""
    if config.transport.num_sources < 2:
        raise build.ConfigError("transport.num_sources 1 is too few: a law takes at least 2 rows")
    num_rows = bank.count.shape[1] * config.transport.num_sources
    label = np.arange(num_rows) * config.data.num_classes // num_rows  # class-major, evenly
    return transport_lib.calibrator(config, bank, operators), label.astype(np.int32)


def save_bank(trained: Trained, workdir: epath.PathLike) -> None:
    """Writes the bank of a trained model, in place of one of an earlier checkpoint or config."""
    folder = restoring.bank_folder(workdir, trained.step)
    if processes.is_first() and folder.exists():
        folder.rmtree()
    settings, place = restoring.bank_settings(trained.config), mesh_lib.replicated(trained.mesh)
    checkpoint.save_tree(str(folder), processes.put(trained.bank, place), settings)
    _remove_others(folder)


def save_refiner(
    trained: Trained, workdir: epath.PathLike, config: build.Config, refiner: types.Refiner
) -> None:
    """Writes a calibrated refiner with the settings it holds for, in place of an earlier one.

    Each has a numbered folder of its own, which appears when it is whole; only then the earlier
    one goes.
    """
    parent = epath.Path(workdir) / "refiner"
    folder = parent / str(1 + max(_numbers(parent), default=0))
    placed = processes.put(refiner, mesh_lib.replicated(trained.mesh))
    checkpoint.save_tree(str(folder), placed, _refiner_settings(trained, config))
    _remove_others(folder)


def _refiner_folder(workdir: epath.PathLike) -> epath.Path:
    """Where the refiner lies; earlier versions had it without a number."""
    parent = epath.Path(workdir) / "refiner"
    return max(((n, parent / str(n)) for n in _numbers(parent)), default=(0, parent))[1]


def _numbers(parent: epath.Path) -> list[int]:
    if not parent.is_dir():
        return []
    return [int(x.name) for x in parent.iterdir() if x.name.isdigit() and checkpoint.is_whole(x)]


def _remove_others(folder: epath.Path) -> None:
    if not processes.is_first():
        return
    for other in folder.parent.iterdir():
        if other.name != folder.name:
            other.rmtree() if other.is_dir() else other.unlink()


def load_refiner(trained: Trained, workdir: epath.PathLike, config: build.Config) -> types.Refiner:
    """Reads what `save_refiner` wrote.

    Raises:
      build.ConfigError: None there, or it was calibrated for another sampler.
      checkpoint.CheckpointError: It is damaged.
    """
    workdir = epath.Path(workdir)
    if transport_lib.kind_of(config).maps is None:
        return calibrate(trained, config)  # nothing is fitted
    directory = _refiner_folder(workdir)
    if not directory.exists():
        raise build.ConfigError(
            f"{workdir} has no calibrated refiner: run `arcond calibrate --checkpoint {workdir}` "
            "with the same settings, or set transport.kind=none"
        )
    wanted = _refiner_settings(trained, config)
    # Keys newer than the refiner have their default, as in a config.
    saved = _refiner_settings(trained, defaults.filled({}, **defaults.choices_of(config)))
    saved |= migration.refiner_settings(checkpoint.load_metadata(str(directory)))
    for name, value in wanted.items():
        if saved[name] != value:
            raise build.ConfigError(
                f"the refiner in {workdir} was calibrated with {name}={saved[name]}, not "
                f"{value}: the conditions depend on it, so run `arcond calibrate` again"
            )
    abstract = mesh_lib.shapes_in(abstract_refiner(config), mesh_lib.replicated(trained.mesh))
    return checkpoint.load_tree(str(directory), abstract)


def abstract_calibrator(
    config: build.Config,
) -> tuple[refiners.Calibrator, Int[np.ndarray, " n"]]:
    """The shapes of the config's calibrator, and the labels of its rollout."""
    bank = jax.eval_shape(lambda: build.empty_bank(config))
    operators = None
    if config.transport.inverse_weight:
        cond = jax.ShapeDtypeStruct((2, bank.count.shape[0], bank.width), jnp.float32)
        operators = jax.eval_shape(inverse.fit_inverse, cond)
    return _calibrator(config, bank, operators)


def abstract_refiner(config: build.Config) -> Any:
    """Shapes of the refiner that the config asks for."""
    unfitted = transport_lib.kind_of(config).unfitted
    if unfitted is not None:
        bank = jax.eval_shape(lambda: build.empty_bank(config))
        return jax.eval_shape(lambda bank: unfitted(bank, transport_lib.options(config)), bank)
    calibrator, label = abstract_calibrator(config)
    return jax.eval_shape(lambda x: x.finish(x.init(jnp.asarray(label))), calibrator)


def _refiner_settings(trained: Trained, config: build.Config) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in config_lib.flat(config).items()
        if name.split(".")[0] in ("sampling", "transport") and name not in WITHOUT_SPECULATION
    }
    return {"checkpoint step": trained.step} | settings
