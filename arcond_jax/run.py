"""The life of a run on disk: train, resume, restore, calibrate, draw.

A working directory holds `checkpoints/` (everything needed to continue, and the bank once training
is done), `metrics.jsonl`, pictures, and `refiner/` once it is calibrated.
"""

import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import clu.parameter_overview
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from arcond_jax import build, checkpoint, sharding, types
from arcond_jax.data import images, pipeline
from arcond_jax.evaluation import card
from arcond_jax.evaluation import classifier as classifier_lib
from arcond_jax.sampling import causal
from arcond_jax.tokenizers import patches
from arcond_jax.training import loop
from arcond_jax.training import state as state_lib
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import inverse, refiners

# What may differ between a checkpoint and the config it is continued or sampled with.
FREE_SECTIONS = ("sampling", "mesh")
FREE_KEYS = (
    "training.num_train_steps",
    "training.log_every",
    "training.samples_every",
    "training.checkpoint_every",
    "training.checkpoints_kept",
)
BANK_KEYS = ("transport.num_atoms", "transport.grouping")  # the rest of `transport` is free too
CALIBRATION_SEED = 1000  # apart from the small seeds people sample with
SAMPLES_PER_CLASS = 10  # on the sheets drawn while training

Show = Callable[[int, UInt8[np.ndarray, "n height width channels"], np.ndarray], None]


def train(config: build.Config, workdir: pathlib.Path, *, show: Show | None = None) -> bool:
    """Trains to `training.num_train_steps`, from the last checkpoint in `workdir` if there is one.

    Args:
      show: Called with (step, images, labels) every `training.samples_every` steps.

    Returns:
      Whether the run is complete; False if it was told to stop (SIGTERM), with everything saved.

    Raises:
      build.ConfigError: The working directory holds a run of another config.
      checkpoint.CheckpointError: It cannot be written or read.
      loop.DivergedError: The gradients stopped being finite.
    """
    # What a config can get wrong shows before anything is written.
    mesh = build.mesh(config)
    iterator = pipeline.train_iterator(
        build.source(config, "train"),
        global_batch_size=config.data.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with checkpoint.Checkpoints(
        str(workdir / "checkpoints"),
        every=config.training.checkpoint_every,
        keep=config.training.checkpoints_kept,
    ) as checkpoints:
        if checkpoints.latest_step() is None:
            state, tokenizer = build.train_state(config, mesh), build.tokenizer(config)
        else:
            _check_same_run(config, checkpoints.config(), workdir)
            abstract_state, abstract_tokenizer = _abstract(config, mesh)
            restored = checkpoints.restore(abstract_state, abstract_tokenizer=abstract_tokenizer)
            state, tokenizer = restored.state, restored.tokenizer
            iterator.set_state(restored.data)
            logging.info("resuming at step %d", restored.step)
            if restored.step >= config.training.num_train_steps:
                return True
        tokenizer = jax.device_put(tokenizer, sharding.replicated(mesh))

        def save(step: int, state: state_lib.TrainState) -> None:
            checkpoints.save(
                step,
                state=state,
                tokenizer=tokenizer,
                data=iterator.get_state(),
                config=config.to_dict(),
                force=True,
            )

        if int(state.step) == 0:
            save(0, state)  # from here on the tokenizer is never fitted again
        (workdir / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        logging.info("parameters:\n%s", clu.parameter_overview.get_parameter_overview(state.params))

        step_fn = build.train_step(config, mesh, tokenizer)
        drawer = Drawer(Trained(config, mesh, tokenizer, state.ema, state.bank, int(state.step)))

        def draw_samples(step: int, state: state_lib.TrainState) -> None:
            if show is not None:
                drawer.trained = dataclasses.replace(drawer.trained, params=state.ema, step=step)
                label = np.repeat(np.arange(num_classes(config)), SAMPLES_PER_CLASS)
                show(step, drawer.images(refiners.Identity(), label, seed=0), label)

        state, complete = loop.train(
            state,
            _MeshBatches(iterator, mesh),
            step_fn=lambda state, batch: step_fn(state, tokenizer, batch),
            num_train_steps=config.training.num_train_steps,
            intervals=loop.Intervals(
                log=config.training.log_every,
                samples=config.training.samples_every,
                checkpoint=config.training.checkpoint_every,
            ),
            save=save,
            draw_samples=draw_samples,
            workdir=workdir,
        )
        if complete:
            trained = dataclasses.replace(drawer.trained, params=state.ema)
            bank = filled_bank(trained)
            save(config.training.num_train_steps, dataclasses.replace(state, bank=bank))
        return complete


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model as sampling needs it; `params` is the average, not the last iterate."""

    config: build.Config
    mesh: Mesh
    tokenizer: patches.Patches
    params: types.Params
    bank: bank_lib.Bank
    step: int


def restore(
    workdir: pathlib.Path, *, config: build.Config | None = None, step: int | None = None
) -> Trained:
    """Opens the checkpoint of a run.

    Args:
      config: None for the one it was trained with; otherwise only the sections `sampling`,
        `mesh` and the intervals may differ from that.
      step: None for the latest.

    Raises:
      checkpoint.CheckpointError: Nothing there, damaged, or of another model.
      build.ConfigError: The config is not that of the run.
    """
    with checkpoint.Checkpoints(str(workdir / "checkpoints")) as checkpoints:
        saved = checkpoints.config(step)
        if config is None:
            config = build.config_from_dict(saved)
        _check_same_run(config, saved, workdir)
        mesh = build.mesh(config)
        abstract_state, abstract_tokenizer = _abstract(config, mesh)
        restored = checkpoints.restore(
            abstract_state, abstract_tokenizer=abstract_tokenizer, step=step
        )
    state = restored.state
    return Trained(config, mesh, restored.tokenizer, state.ema, state.bank, restored.step)


class Drawer:
    """Compiled sampling: class labels in, images out, the batch spread over the mesh."""

    def __init__(
        self, trained: Trained, config: build.Config | None = None, *, trace: bool = False
    ) -> None:
        """Compiles lazily, once per number of labels and kind of refiner.

        `trained` may be replaced by a later state of the same run; what is compiled stays.

        Args:
          config: Another sampling section than the run's own; None for its own.
          trace: Keep conditions before and after refinement.
        """
        self.trained = trained
        self._loop = build.sampler(config or trained.config, trace=trace)
        self._run = sharding.on_mesh(self._draw, trained.mesh)

    def __call__(
        self, refiner: types.Refiner, label: Int[np.ndarray, " n"], *, seed: int, first_row: int = 0
    ) -> tuple[jax.Array, causal.Sampled]:
        """Draws one image in [-1, 1] per label, and what the loop left.

        Image i depends on (seed, first_row + i, its label) alone, unless the refiner mixes rows.

        Raises:
          build.ConfigError: A label is not a class.
        """
        check_labels(label, num_classes(self.trained.config))
        mesh = self.trained.mesh
        spread = len(label) % sharding.num_batch_shards(mesh) == 0
        place = sharding.batch_sharding(mesh) if spread else sharding.replicated(mesh)
        return self._run(
            self.trained.params,
            self.trained.tokenizer,
            refiner,
            jax.random.key(seed),
            jax.device_put(np.asarray(label, np.int32), place),
            first_row,
        )

    def images(
        self,
        refiner: types.Refiner,
        label: Int[np.ndarray, " n"],
        *,
        seed: int,
        batch_size: int | None = None,
    ) -> UInt8[np.ndarray, "n height width channels"]:
        """The images alone, as uint8 on the host, drawn in batches of one size."""
        batch_size = batch_size or len(label)
        drawn = []
        for start in range(0, len(label), batch_size):
            part = label[start : start + batch_size]
            # The last batch is filled up, so that the loop compiles once.
            padded = np.pad(part, (0, batch_size - len(part)), mode="edge")
            image, _ = self(refiner, padded, seed=seed, first_row=start)
            drawn.append(images.image_to_uint8(np.asarray(image)[: len(part)]))
        return np.concatenate(drawn)

    def _draw(self, params, tokenizer, refiner, rng, label, first_row):
        law = causal.CodeLaw(tokenizer.code_mean, tokenizer.code_cholesky)
        sampled = self._loop(params, rng, label, refiner=refiner, code_law=law, first_row=first_row)
        return tokenizer.decode(sampled.tokens), sampled


def config_for(workdir: pathlib.Path, path: str | None, overrides: list[str]) -> build.Config:
    """The config to sample a run with: a file's, or the run's own, with overrides on top."""
    if path is not None:
        return build.load_config(path, overrides)
    with checkpoint.Checkpoints(str(workdir / "checkpoints")) as checkpoints:
        return build.with_overrides(build.config_from_dict(checkpoints.config()), overrides)


def provenance(trained: Trained, config: build.Config, *, seed: int) -> card.Settings:
    """How samples are made, for their file and their evaluation card."""
    sampling, model = config.sampling, build.network(config)
    kind = config.transport.kind
    return card.Settings(
        guidance_scale=sampling.guidance_scale,
        guidance_schedule=sampling.guidance_schedule,
        code_temperature=sampling.code_temperature if model.num_codes else None,
        latent_temperature=sampling.latent_temperature if model.head else None,
        num_head_evaluations=sampling.num_head_evaluations if model.head else 0,
        refinement=None if kind == "none" else kind,
        refinement_settings={} if kind == "none" else config.transport.to_dict(),
        seed=seed,
        checkpoint_step=trained.step,
    )


def reference(config: build.Config, workdir: pathlib.Path) -> card.Reference:
    """Real images to compare with, and a classifier of them that is kept with the run."""
    train_split, held_out = (build.source(config, split) for split in ("train", "held_out"))
    path = workdir / "classifier.npz"
    image, label = _all_of(train_split)
    if path.exists():
        classifier = classifier_lib.load(path)
    else:
        classifier = classifier_lib.train_classifier(
            image, label, num_classes=num_classes(config), seed=config.seed
        )
        classifier.save(path)
    held_out_image, held_out_label = _all_of(held_out)
    return card.reference(
        held_out_image,
        held_out_label,
        image_train=image,
        classifier=classifier,
        name=f"{config.data.name}, held out",
        feature_extractor=f"a small classifier trained on the {config.data.name} train split",
    )


def _all_of(split: pipeline.Source) -> tuple[np.ndarray, np.ndarray]:
    batch = next(pipeline.full_batches(split, len(split)))
    return batch["image"], batch["label"]


def num_classes(config: build.Config) -> int:
    """Classes of the config's dataset."""
    return build.SOURCES[config.data.name].num_classes


def check_labels(label: Int[np.ndarray, " n"], count: int) -> None:
    """Raises ConfigError unless all labels are classes."""
    wrong = [int(x) for x in np.asarray(label) if not 0 <= x < count]
    if wrong:
        raise build.ConfigError(f"label {wrong[0]} is not a class: use 0 to {count - 1}")


def conditions(trained: Trained, split: str) -> tuple[Float[np.ndarray, "n l d"], np.ndarray]:
    """Teacher-forced conditions of a split in its order, and its labels."""
    generator = build.generator(trained.config, trained.tokenizer)

    def run(params, tokenizer, image, label):
        return generator.conditions(params, tokenizer.encode(image), label)

    run = sharding.on_mesh(run, trained.mesh)
    conds, labels = [], []
    for batch in pipeline.full_batches(build.source(trained.config, split), 128):
        placed = sharding.put_batch({k: batch[k] for k in ("image", "label")}, trained.mesh)
        cond = run(trained.params, trained.tokenizer, placed["image"], placed["label"])
        conds.append(np.asarray(cond)[batch["valid"]])
        labels.append(batch["label"][batch["valid"]])
    return np.concatenate(conds), np.concatenate(labels)


def filled_bank(trained: Trained) -> bank_lib.Bank:
    """A bank of the training set's conditions under the averaged parameters, in one pass.

    Conditions drift while the network trains, so what counts is how they are at the end.
    """
    cond, label = conditions(trained, "train")
    bank = build.empty_bank(trained.config)
    group = jnp.zeros_like(label) if bank.count.shape[1] == 1 else jnp.asarray(label)
    update = sharding.on_mesh(bank_lib.update_bank, trained.mesh)
    return update(bank, jnp.asarray(cond), group=group)


def calibrate(trained: Trained, config: build.Config | None = None) -> types.Refiner:
    """Makes the refiner that a config asks for, fitted to the sampler of the same config.

    One rollout with equally many rows for every group: at each position the maps are fitted to
    the conditions that sampling reaches, which depend on the sampler's own settings.

    Raises:
      build.ConfigError: The bank is empty.
    """
    config = config or trained.config
    kind = config.transport.kind
    if kind == "none":
        return refiners.Identity()
    if int(trained.bank.count.min()) == 0:
        raise build.ConfigError(
            f"the bank of step {trained.step} is empty: it is filled when training completes; "
            "finish training, or set transport.kind=none"
        )
    if kind == "in_batch":
        return refiners.InBatch(trained.bank, options=build.refine_options(config))
    calibrator, label = _calibrator(trained, config)
    _, sampled = Drawer(trained, config)(calibrator, label, seed=CALIBRATION_SEED)
    return calibrator.finish(sampled.refiner_state)


def _calibrator(
    trained: Trained, config: build.Config
) -> tuple[refiners.Calibrator | refiners.BuresCalibrator, Int[np.ndarray, " n"]]:
    """The calibrator of a config, and the labels of its rollout."""
    options = build.refine_options(config)
    operators = None
    if options.inverse_weight:
        operators = inverse.fit_inverse(jnp.asarray(conditions(trained, "train")[0]))
    make = {"stored": refiners.Calibrator, "bures": refiners.BuresCalibrator}[config.transport.kind]
    calibrator = make(
        trained.bank, inverse=operators, options=options, grouping=config.transport.grouping
    )
    return calibrator, np.repeat(np.arange(num_classes(config)), config.transport.num_sources)


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
    saved, wanted = checkpoint.load_metadata(str(directory)), _refiner_settings(trained, config)
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise build.ConfigError(
                f"the refiner in {workdir} was calibrated with {name}={saved.get(name)}, not "
                f"{value}: the conditions depend on it, so run `arcond calibrate` again"
            )
    calibrator, label = _calibrator(trained, config)
    shapes = jax.eval_shape(lambda: calibrator.finish(calibrator.init(jnp.asarray(label))))
    whole = sharding.replicated(trained.mesh)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes
    )
    return checkpoint.load_tree(str(directory), abstract)


def _refiner_settings(trained: Trained, config: build.Config) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in build.flat(config).items()
        if name.split(".")[0] in ("sampling", "transport")
    }
    return {"checkpoint step": trained.step} | settings


def _abstract(config: build.Config, mesh: Mesh) -> tuple[Any, Any]:
    """What to restore a run into: shapes with their places on the mesh."""
    whole = sharding.replicated(mesh)
    tokenizer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        build.abstract_tokenizer(config),
    )
    state = state_lib.abstract_on(build.abstract_state(config), mesh)
    return state, tokenizer


def _check_same_run(config: build.Config, saved: Mapping[str, Any], workdir: pathlib.Path) -> None:
    ours, theirs = build.flat(config), build.flat(build.config_from_dict(saved))
    for name in sorted(ours | theirs):
        section = name.split(".")[0]
        if section in FREE_SECTIONS or name in FREE_KEYS:
            continue
        if section == "transport" and name not in BANK_KEYS:
            continue
        if ours.get(name) != theirs.get(name):
            raise build.ConfigError(
                f"{workdir} holds a run with {name}={theirs.get(name)}, the config says "
                f"{ours.get(name)}: use its config or another workdir"
            )


class _MeshBatches:
    """The process's numpy batches as global arrays on the mesh."""

    def __init__(self, iterator: Any, mesh: Mesh) -> None:
        self._iterator, self._mesh = iterator, mesh

    def __next__(self) -> types.Batch:
        return sharding.put_batch(types.Batch(**next(self._iterator)), self._mesh)
