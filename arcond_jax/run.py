"""The life of a run on disk: train, resume, restore, calibrate, draw.

A working directory holds `checkpoints/` (everything needed to continue, and the bank once training
is done), `metrics.jsonl`, pictures, and `refiner/` once it is calibrated. One of converted weights
holds `weights/` instead of checkpoints, and can be sampled and calibrated like any other.
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
from jaxtyping import Bool, Float, Float32, Int, UInt8

from arcond_jax import build, checkpoint, sharding, types
from arcond_jax import config as config_lib
from arcond_jax.data import images, pipeline
from arcond_jax.evaluation import card, npz
from arcond_jax.evaluation import classifier as classifier_lib
from arcond_jax.models import captioned, dit
from arcond_jax.sampling import mar as mar_sampling
from arcond_jax.sampling import sampled as sampled_lib
from arcond_jax.training import loop
from arcond_jax.training import state as state_lib
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import inverse, refiners

# What may differ between a checkpoint and the config it is continued or sampled with.
FREE_SECTIONS = ("sampling", "mesh", "transport")
FREE_KEYS = (
    "data.directory",
    "tokenizer.path",
    "training.num_train_steps",
    "training.log_every",
    "training.samples_every",
    "training.checkpoint_every",
    "training.checkpoints_kept",
)
# Of the section `sampling`: what a card says only where it is set.
OTHER_SETTINGS = (
    "top_k",
    "top_p",
    "min_p",
    "guided_positions",
    "later_guidance_scale",
    "later_code_temperature",
    "clip_latents",
    "warm_start",
)
IMAGES_PER_ATOM = 8  # read to fill a bank, at most: a group's ring is then full whatever the order
CONDITIONS_SEED = 0  # of the orders in which MAR's conditions are met
CONDITIONS_BATCH = 128
CALIBRATION_SEED = 1000  # apart from the small seeds people sample with
SAMPLES_PER_CLASS = 10  # on the sheets drawn while training

Show = Callable[[int, UInt8[np.ndarray, "n height width channels"], np.ndarray], None]


def train(
    config: build.Config,
    workdir: pathlib.Path,
    *,
    show: Show | None = None,
    init_from: pathlib.Path | None = None,
) -> bool:
    """Trains to `training.num_train_steps`, from the last checkpoint in `workdir` if there is one.

    Args:
      init_from: A working directory whose averaged parameters a fresh run starts with.
      show: Called with (step, images, labels) every `training.samples_every` steps.

    Returns:
      Whether the run is complete; False if it was told to stop (SIGTERM), with everything saved.

    Raises:
      build.ConfigError: The working directory holds a run of another config.
      checkpoint.CheckpointError: It cannot be written or read.
      loop.DivergedError: The gradients stopped being finite.
    """
    # What a config can get wrong shows before anything is written.
    build.check_trained(config)
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
            if init_from is not None:
                state = state_lib.with_params(state, params_of(init_from, config, mesh))
        else:
            saved = checkpoints.config()
            _check_same_run(config, saved, workdir)
            abstract_state, abstract_tokenizer = _abstract(config, saved, mesh)
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
            bank = None if state.bank is None else filled_bank(trained)
            save(config.training.num_train_steps, dataclasses.replace(state, bank=bank))
        return complete


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model as sampling needs it; `params` is the average, not the last iterate.

    The bank is None, or of another shape than the config's, until it is calibrated.
    """

    config: build.Config
    mesh: Mesh
    tokenizer: types.Tokenizer
    params: types.Params
    bank: bank_lib.Bank | None
    step: int


def restore(
    workdir: pathlib.Path, *, config: build.Config | None = None, step: int | None = None
) -> Trained:
    """Opens the checkpoint of a run, or converted weights.

    Args:
      config: None for the one it was trained with; otherwise only the sections `sampling`,
        `transport`, `mesh` and what says where things are may differ from that.
      step: None for the latest.

    Raises:
      checkpoint.CheckpointError: Nothing there, damaged, or of another model.
      build.ConfigError: The config is not that of the run, or names no tokenizer.
    """
    if is_converted(workdir):
        saved = checkpoint.load_metadata(str(workdir / build.WEIGHTS))["config"]
        config = config or config_lib.from_dict(saved)
        _check_same_run(config, saved, workdir)
        mesh = build.mesh(config)
        params = params_of(workdir, config, mesh)
        tokenizer = jax.device_put(build.tokenizer(config), sharding.replicated(mesh))
        return Trained(config, mesh, tokenizer, params, bank=None, step=0)
    with checkpoint.Checkpoints(str(workdir / "checkpoints")) as checkpoints:
        saved = checkpoints.config(step)
        config = config or config_lib.from_dict(saved)
        _check_same_run(config, saved, workdir)
        mesh = build.mesh(config)
        abstract_state, abstract_tokenizer = _abstract(config, saved, mesh)
        restored = checkpoints.restore(
            abstract_state, abstract_tokenizer=abstract_tokenizer, step=step
        )
    state = restored.state
    return Trained(config, mesh, restored.tokenizer, state.ema, state.bank, restored.step)


def is_converted(workdir: pathlib.Path) -> bool:
    """Whether a directory holds converted weights rather than the checkpoints of a run."""
    return (workdir / build.WEIGHTS).is_dir()


def params_of(workdir: pathlib.Path, config: build.Config, mesh: Mesh) -> types.Params:
    """The parameters that a directory is sampled with, in the places of the mesh."""
    if not is_converted(workdir):
        return restore(workdir).params
    abstract = state_lib.abstract_on(build.abstract_params(config), mesh)
    return build.load_weights(str(workdir), abstract)


class Drawer:
    """Compiled sampling: class labels in, images out, the batch spread over the mesh."""

    def __init__(
        self,
        trained: Trained,
        config: build.Config | None = None,
        *,
        trace: bool = False,
        num_known: int = 0,
    ) -> None:
        """Compiles lazily, once per number of labels and kind of refiner.

        `trained` may be replaced by a later state of the same run; what is compiled stays.

        Args:
          config: Another sampling section than the run's own; None for its own.
          trace: Keep conditions before and after refinement.
          num_known: Tokens that are given in every call.
        """
        self.trained = trained
        self._loop = build.sampler(config or trained.config, trace=trace, num_known=num_known)
        self._run = sharding.on_mesh(self._draw, trained.mesh)

    def __call__(
        self,
        refiner: types.Refiner,
        label: Int[np.ndarray, " n"],
        *,
        seed: int,
        first_row: int = 0,
        known: mar_sampling.Known | None = None,
    ) -> tuple[jax.Array, sampled_lib.Sampled]:
        """Draws one image in [-1, 1] per label, and what the loop left.

        Image i depends on (seed, first_row + i, its label) alone, unless the refiner mixes rows.

        Args:
          known: One row of tokens to keep, the same for all images.

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
            known,
        )

    def images(
        self,
        refiner: types.Refiner,
        label: Int[np.ndarray, " n"],
        *,
        seed: int,
        batch_size: int | None = None,
        known: mar_sampling.Known | None = None,
    ) -> UInt8[np.ndarray, "n height width channels"]:
        """The images alone, as uint8 on the host, drawn in batches of one size."""
        batch_size = batch_size or len(label)
        drawn = []
        for start in range(0, len(label), batch_size):
            part = label[start : start + batch_size]
            # The last batch is filled up, so that the loop compiles once.
            padded = np.pad(part, (0, batch_size - len(part)), mode="edge")
            image, _ = self(refiner, padded, seed=seed, first_row=start, known=known)
            drawn.append(images.image_to_uint8(np.asarray(image)[: len(part)]))
        return np.concatenate(drawn)

    def _draw(self, params, tokenizer, refiner, rng, label, first_row, known):
        given: dict[str, Any] = {}
        if known is not None:
            given["known"] = jax.tree.map(lambda x: jnp.repeat(x, len(label), axis=0), known)
        sampled = self._loop(
            params,
            rng,
            label,
            refiner=refiner,
            code_law=tokenizer.code_law,
            first_row=first_row,
            **given,
        )
        return tokenizer.decode(sampled.tokens), sampled


def known_tokens(
    trained: Trained,
    image: Float[np.ndarray, "height width channels"],
    keep: Bool[np.ndarray, "mask_height mask_width"],
) -> mar_sampling.Known:
    """The tokens of an image that stay: those all of whose pixels are kept.

    Raises:
      build.ConfigError: Image or mask are not of the model's size, or nothing is left to draw.
    """
    config = trained.config
    wanted = build.image_shape(config)
    for name, shape in (("image", image.shape), ("mask", keep.shape)):
        if shape != wanted[: len(shape)]:
            found, size = ("x".join(map(str, x)) for x in (shape, wanted))
            raise build.ConfigError(
                f"the {name} is {found}, the model draws images of {size}: scale or crop it to that"
            )
    rows, columns = build.grid(config)
    squares = keep.reshape(rows, keep.shape[0] // rows, columns, keep.shape[1] // columns)
    given = squares.all(axis=(1, 3)).reshape(1, -1)
    if given.all():
        raise build.ConfigError("the mask keeps every token: make some of it white, to be drawn")
    latents = trained.tokenizer.encode(jnp.asarray(image)[None]).latents
    if latents is None:
        raise build.ConfigError(f"tokenizer {config.tokenizer.name} gives no latents to keep")
    return mar_sampling.Known(latents=latents, given=jnp.asarray(given))


@dataclasses.dataclass(frozen=True)
class Captions:
    """Encoded captions; `valid` is False at their padding, which comes first."""

    embedding: Float32[np.ndarray, "n prefix caption_width"]
    valid: Bool[np.ndarray, "n prefix"]


def read_captions(path: pathlib.Path, config: build.Config) -> Captions:
    """Reads what `arcond captions` wrote.

    Raises:
      build.ConfigError: They are not captions of the model.
      FileNotFoundError, ValueError: No such file, or damaged.
    """
    arrays = npz.read(path, what="file of captions")
    missing = {"embedding", "valid"} - arrays.keys()
    if missing:
        raise build.ConfigError(f"{path} is no file of captions: it lacks {', '.join(missing)}")
    embedding, valid = arrays["embedding"], arrays["valid"]
    size = (config.captioned.num_prefix, config.captioned.caption_width)
    if embedding.ndim != 3 or embedding.shape[1:] != size or len(embedding) == 0:
        raise build.ConfigError(
            f"{path}: embedding is {list(embedding.shape)}, the model needs [n, {size[0]}, "
            f"{size[1]}] of at least one caption"
        )
    if valid.shape != embedding.shape[:2] or valid.dtype != np.bool_:
        raise build.ConfigError(
            f"{path}: valid is {valid.dtype} {list(valid.shape)}, the captions need bool "
            f"{list(embedding.shape[:2])}"
        )
    if not np.issubdtype(embedding.dtype, np.floating) or not np.isfinite(embedding).all():
        raise build.ConfigError(f"{path}: embedding holds something else than finite floats")
    if not (valid[:, -1].all() and (valid[:, 1:] >= valid[:, :-1]).all()):
        raise build.ConfigError(
            f"{path}: valid must be False at the padding in front of a caption and True from there "
            "to the end"
        )
    return Captions(embedding.astype(np.float32), valid)


def with_captions(trained: Trained, captions: Captions) -> Trained:
    """The model with captions for its classes."""
    config = trained.config.copy_and_resolve_references()
    config.data.num_classes = len(captions.valid)
    placed = jax.device_put((captions.embedding, captions.valid), sharding.replicated(trained.mesh))
    params = captioned.with_captions(trained.params, *placed)
    return dataclasses.replace(trained, config=config, params=params)


def config_for(workdir: pathlib.Path, path: str | None, overrides: list[str]) -> build.Config:
    """The config to sample a run with: a file's, or the run's own, with overrides on top."""
    if path is not None:
        return build.load_config(path, overrides)
    if is_converted(workdir):
        saved = checkpoint.load_metadata(str(workdir / build.WEIGHTS))["config"]
    else:
        with checkpoint.Checkpoints(str(workdir / "checkpoints")) as checkpoints:
            saved = checkpoints.config()
    return build.with_overrides(config_lib.from_dict(saved), overrides)


def provenance(trained: Trained, config: build.Config, *, seed: int) -> card.Settings:
    """How samples are made, for their file and their evaluation card."""
    sampling, kind = config.sampling, config.transport.kind
    has_codes, has_latents = config.loss.w_tensor > 0, config.loss.w_diffusion > 0
    names = OTHER_SETTINGS
    names += ("guidance_power",) if sampling.guidance_schedule == "power_cosine" else ()
    names += ("spacing",) if has_latents else ()
    names += ("drafts", "stride") if has_codes and config.tensorar.window > 1 else ()
    return card.Settings(
        other_settings={name: sampling[name] for name in names if sampling[name] is not None},
        guidance_scale=sampling.guidance_scale,
        guidance_schedule=sampling.guidance_schedule,
        code_temperature=sampling.code_temperature if has_codes else None,
        latent_temperature=sampling.latent_temperature if has_latents else None,
        num_ar_steps=sampling.num_ar_steps if config.backbone == "mar" else None,
        solver=sampling.solver if has_latents else None,
        num_head_evaluations=sampling.num_head_evaluations if has_latents else 0,
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
    return config.data.num_classes


def check_labels(label: Int[np.ndarray, " n"], count: int) -> None:
    """Raises ConfigError unless all labels are classes."""
    wrong = [int(x) for x in np.asarray(label) if not 0 <= x < count]
    if wrong:
        raise build.ConfigError(f"label {wrong[0]} is not a class: use 0 to {count - 1}")


def conditions(
    trained: Trained, split: str, *, at_most: int | None = None
) -> tuple[Float[np.ndarray, "n s d"], Int[np.ndarray, " n"]]:
    """Teacher-forced conditions of a split in its order, and its labels.

    Args:
      at_most: Images to take, spread over the split; None takes all.
    """
    generator = build.generator(trained.config, trained.tokenizer)
    if isinstance(generator, dit.Generator):
        raise build.ConfigError("backbone dit has one condition for all tokens, and none per token")

    def run(params, tokenizer, image, label, rng):
        return generator.conditions(params, tokenizer.encode(image), label, rng)

    run = sharding.on_mesh(run, trained.mesh)
    source = build.source(trained.config, split)
    batches = pipeline.full_batches(source, CONDITIONS_BATCH, at_most=at_most)
    conds, labels = [], []
    for number, batch in enumerate(batches):
        placed = sharding.put_batch({k: batch[k] for k in ("image", "label")}, trained.mesh)
        rng = jax.random.fold_in(jax.random.key(CONDITIONS_SEED), number)
        cond = run(trained.params, trained.tokenizer, placed["image"], placed["label"], rng)
        conds.append(np.asarray(cond)[batch["valid"]])
        labels.append(batch["label"][batch["valid"]])
    return np.concatenate(conds), np.concatenate(labels)


def filled_bank(trained: Trained) -> bank_lib.Bank:
    """A bank of the training set's conditions under the averaged parameters, in one pass.

    Conditions drift while the network trains, so what counts is how they are at the end.
    """
    bank = build.empty_bank(trained.config)
    if bank is None:
        raise build.ConfigError("transport.kind is none, and without refinement there is no bank")
    num_groups = bank.count.shape[1]
    enough = IMAGES_PER_ATOM * trained.config.transport.num_atoms * num_groups
    cond, label = conditions(trained, "train", at_most=enough)
    group = jnp.zeros_like(label) if num_groups == 1 else jnp.asarray(label)
    update = sharding.on_mesh(bank_lib.update_bank, trained.mesh)
    return update(bank, jnp.asarray(cond), group=group)


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
        return refiners.InBatch(bank, options=build.refine_options(trained.config))
    calibrator, label = _calibrator(trained, bank)
    _, sampled = Drawer(trained)(calibrator, label, seed=CALIBRATION_SEED)
    return calibrator.finish(sampled.refiner_state)


def _fitting_bank(trained: Trained) -> bank_lib.Bank:
    """The stored bank, or one filled now if that is empty or has other slots, groups or atoms."""
    wanted, bank = jax.eval_shape(lambda: build.empty_bank(trained.config)), trained.bank
    if bank is not None and bank.atoms.shape == wanted.atoms.shape and int(bank.count.min()) > 0:
        return bank
    logging.info("filling the bank of ideal conditions from the training split")
    return filled_bank(trained)


def _calibrator(
    trained: Trained, bank: bank_lib.Bank
) -> tuple[refiners.Calibrator | refiners.BuresCalibrator, Int[np.ndarray, " n"]]:
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
    make = {"stored": refiners.Calibrator, "bures": refiners.BuresCalibrator}[config.transport.kind]
    calibrator = make(bank, inverse=operators, options=options, grouping=config.transport.grouping)
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
    bank = jax.eval_shape(lambda: build.empty_bank(config))
    trained = dataclasses.replace(trained, config=config)
    calibrator, label = _calibrator(trained, bank)
    shapes = jax.eval_shape(lambda: calibrator.finish(calibrator.init(jnp.asarray(label))))
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


def _abstract(config: build.Config, saved: Mapping[str, Any], mesh: Mesh) -> tuple[Any, Any]:
    """What to restore a run into: shapes with their places on the mesh.

    The bank has the shape of the config it was saved with.
    """
    whole = sharding.replicated(mesh)
    tokenizer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        build.abstract_tokenizer(config),
    )
    abstract = build.abstract_state(config_lib.from_dict(saved))
    return state_lib.abstract_on(abstract, mesh), tokenizer


def _check_same_run(config: build.Config, saved: Mapping[str, Any], workdir: pathlib.Path) -> None:
    ours, theirs = config_lib.flat(config), config_lib.flat(config_lib.from_dict(saved))
    for name in sorted(ours | theirs):
        section = name.split(".")[0]
        if section in FREE_SECTIONS or name in FREE_KEYS:
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
