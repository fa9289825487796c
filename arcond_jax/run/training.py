"""Training from a config to its last step, stopped and resumed at any point."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import clu.parameter_overview
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import UInt8

from arcond_jax import atomic, build, checkpoint, types
from arcond_jax.build import saved as saved_lib
from arcond_jax.data import folder, pipeline
from arcond_jax.parallel import compiled, operations, processes, stalling
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.run import captions as captions_lib
from arcond_jax.run import drawing, exclusive, online, refinement, restoring
from arcond_jax.run import initial as initial_lib
from arcond_jax.training import loop, profiling, rates, stopping
from arcond_jax.training import state as state_lib
from arcond_jax.training import writer as writer_lib
from arcond_jax.transport import refiners

# On the sheets drawn while training.
SAMPLES_PER_CLASS = 10
MAX_CLASSES = 20  # the first ones
MAX_UNCHANGED = 0.5  # share of drafts that noise leaves as they are


@dataclasses.dataclass(frozen=True)
class Watch:
    """How a run is looked at.

    Attributes:
      wandb_project: Of Weights & Biases, where its numbers go too.
      profile: Steps of which a trace is written.
      stall_minutes: Ends the process, as `stalling.watched` does, when no step ended for so long.
    """

    wandb_project: str | None = None
    profile: profiling.Span | None = None
    stall_minutes: float | None = None


Images = UInt8[np.ndarray, "n height width channels"]
Show = Callable[[int, Images, np.ndarray, tuple[str, ...] | None], None]


def train(
    config: build.Config,
    workdir: epath.PathLike,
    *,
    show: Show | None = None,
    start_from: initial_lib.Initial | None = None,
    restart_from: int | None = None,
    watch: Watch | None = None,
) -> bool:
    """Trains to `training.num_train_steps`, from the last checkpoint in `workdir` if there is one.

    Args:
      show: Called with (step, images, labels, names of the classes or None) every
        `training.samples_every` steps.
      start_from: Weights that a fresh run starts with.
      restart_from: Step of an earlier checkpoint to go on from; later ones are removed.
      watch: How it is looked at, beside its log in `workdir`.

    Returns:
      Whether the run is complete; False if it was told to stop (SIGTERM, SIGINT or SIGHUP), with
      everything saved.

    Raises:
      build.ConfigError: The working directory holds a run of another config or of other classes,
        another run is training there, or the weights to start from do not fit.
      checkpoint.CheckpointError: It cannot be written or read.
      loop.DivergedError: Gradients stopped being finite.
    """
    workdir, watch = epath.Path(workdir), watch or Watch()
    if watch.wandb_project is not None:
        writer_lib.check_wandb()
    # What a config can get wrong shows before anything is written.
    build.check_trained(config)
    online.check(config)
    mesh, settings = build.training_mesh(config), config.training
    captions = captions_lib.of_training(config)
    batches = _Batches(config, mesh, captions)
    _warn_of_held_out(config)
    fresh = None
    if not checkpoint.has_steps(f"{workdir}/checkpoints"):
        if restart_from is not None:
            raise build.ConfigError(f"{workdir} has no checkpoint to restart from")
        fresh = _fresh(config, batches, start_from)
    elif start_from is not None:
        logging.info("%s holds a run, which goes on: --init is not read again", workdir)
    with (
        stopping.Stop() as stop,
        exclusive.only_run(workdir),
        stalling.watched(watch.stall_minutes),
        checkpoint.Checkpoints(
            f"{workdir}/checkpoints",
            every=settings.checkpoint_every,
            keep=settings.checkpoints_kept,
        ) as checkpoints,
    ):
        stop.is_writing = checkpoints.is_writing
        state, tokenizer = fresh or _resumed(config, workdir, checkpoints, batches, restart_from)
        tokenizer = processes.put(tokenizer, mesh_lib.replicated(mesh))
        trained = restoring.Trained(
            config, mesh, tokenizer, state.ema, None, int(state.step), batches.class_names
        )
        if trained.step < settings.num_train_steps:
            draw = _sheets(trained, captions, show)
            judge = online.judge(config, workdir)
            state = _train(trained, workdir, checkpoints, batches, state, draw, judge, stop, watch)
            trained = dataclasses.replace(trained, params=state.ema, step=int(state.step))
        with stalling.longer():
            checkpoints.wait()
            stop.unsaved = False
            if processes.anywhere(bool(stop)) or trained.step < settings.num_train_steps:
                return False
            _fill_bank(trained, workdir)
            return not processes.anywhere(bool(stop))


def _warn_of_held_out(config: build.Config) -> None:
    """Says now what `evaluate` would refuse after training; a run may have no held-out images."""
    if config.data.name == "cache":
        return
    try:
        build.source(config, "held_out")
    except folder.NoSplitError:
        pass
    except (ValueError, OSError) as error:
        logging.warning("the held-out images cannot be used to evaluate this run: %s", error)


def _check_space(workdir: epath.Path, state: state_lib.TrainState) -> None:
    """Of several processes the others would wait for one that cannot write."""
    if not processes.are_several() or "://" in str(workdir):
        return
    needed = sum(x.nbytes for x in jax.tree.leaves(state))
    is_short = processes.is_first() and shutil.disk_usage(workdir).free < needed
    if processes.anywhere(is_short):
        raise checkpoint.CheckpointError(
            f"{workdir}: no space left for a checkpoint of {needed / 2**20:.3g} MiB: free some, "
            "and start again"
        )


def _train(
    trained: restoring.Trained,
    workdir: epath.Path,
    checkpoints: checkpoint.Checkpoints,
    batches: "_Batches",
    state: state_lib.TrainState,
    draw: Callable[[int, state_lib.TrainState], None],
    judge: online.Judge | None,
    stop: stopping.Stop,
    watch: Watch,
) -> state_lib.TrainState:
    """The state after the last step, or after the one at which the run was told to stop; saved."""
    config, tokenizer, settings = trained.config, trained.tokenizer, trained.config.training
    sha256 = restoring.keep_tokenizer(workdir, tokenizer)
    saved_config = saved_lib.dump(config, batches.class_names, tokenizer_sha256=sha256)

    def save(step: int, state: state_lib.TrainState) -> None:
        _check_space(workdir, state)
        checkpoints.save(
            step,
            state=state,
            tokenizer=None,
            data=batches.get_state(),
            config=saved_config,
            force=True,
        )

    if trained.step == 0:
        save(0, state)  # from here on the tokenizer is never fitted again
    if processes.is_first():
        atomic.write_text(workdir / "config.json", json.dumps(saved_config, indent=2) + "\n")
    logging.info("parameters:\n%s", clu.parameter_overview.get_parameter_overview(state.params))
    compiled_step = build.train_step(config, trained.mesh, tokenizer)

    def step_fn(state: state_lib.TrainState, batch: types.Batch) -> tuple[Any, dict]:
        checkpoints.check()  # no step more than needed where the disk is full
        updated = compiled_step(state, tokenizer, batch)
        stalling.ended()  # this step is queued, and the one before the last has
        return updated

    evaluate = None
    if judge is not None:
        best = online.Best(
            workdir, trained, judge, position=batches.get_state, saved_config=saved_config
        )
        evaluate = online.Scores(trained, judge, batches.captions, best)
    writers = []
    if processes.is_first():
        writers = writer_lib.make_writers(
            workdir,
            resume_at=trained.step,
            wandb_project=watch.wandb_project,
            settings=config.to_dict(),
        )
    return loop.train(
        state,
        batches,
        step_fn=step_fn,
        num_train_steps=settings.num_train_steps,
        intervals=loop.Intervals(
            log=settings.log_every,
            samples=settings.samples_every,
            checkpoint=settings.checkpoint_every,
            evaluation=config.evaluation.every,
        ),
        save=save,
        draw_samples=draw,
        stop=stop,
        workdir=workdir,
        work=_work(trained, compiled_step),
        writers=writers,
        profile=watch.profile,
        measure=_measure(trained),
        evaluate=evaluate,
    )


def _work(trained: restoring.Trained, train_step: compiled.Compiled) -> rates.Work:
    """What a step does, what is computed again left out."""
    config, mesh, tokenizer = trained.config, trained.mesh, trained.tokenizer
    if config.model.get("remat", "none") != "none":
        plain = build.changed(config, {"model.remat": "none"})
        train_step = build.train_step(plain, mesh, tokenizer)

    def of_device(state: state_lib.TrainState, batch: types.Batch) -> float | None:
        total = operations.count(train_step.trace(state, tokenizer, batch).jaxpr)
        return None if total is None else total / mesh.size

    return rates.Work(config.data.batch_size, of_device)


def _measure(trained: restoring.Trained) -> loop.Measure | None:
    """Measures windows where there are any; says once if their drafts teach copying."""
    config, tokenizer = trained.config, trained.tokenizer
    measure_fn = build.window_metrics(config, trained.mesh, tokenizer)
    if measure_fn is None:
        return None
    unsaid = config.tensorar.noise != "none"

    def measure(state: state_lib.TrainState, batch: types.Batch) -> dict[str, float]:
        nonlocal unsaid
        with stalling.longer():
            scalars = {name: float(x) for name, x in measure_fn(state, tokenizer, batch).items()}
        same = {x: scalars[x] for x in scalars if x.startswith("windows/unchanged")}
        copied = [f"{name} {share:.2f}" for name, share in same.items() if share > MAX_UNCHANGED]
        if unsaid and copied:
            unsaid = False
            logging.warning(
                "%s: most of these drafts are the real codes, which teaches copying; take another "
                "tensorar.noise_schedule or tensorar.noise",
                ", ".join(copied),
            )
        return scalars

    return measure


def _fresh(
    config: build.Config, batches: "_Batches", start_from: initial_lib.Initial | None
) -> tuple[state_lib.TrainState, types.Tokenizer]:
    """A state and a tokenizer to begin with; nothing is written yet."""
    initial_lib.check_given(config, start_from)
    mesh, tokenizer = batches.mesh, None
    state = build.train_state(config, mesh)
    if start_from is not None:
        params, tokenizer = initial_lib.start(
            start_from, config, state.params, mesh, batches.class_names
        )
        state = state_lib.with_params(state, params)
    if tokenizer is None:
        abstract = build.abstract_tokenizer(config)
        tokenizer = processes.from_first(lambda: build.tokenizer(config), abstract)
    build.check_cache(config, tokenizer)
    build.check_law(config, tokenizer)
    return state, tokenizer


def _resumed(
    config: build.Config,
    workdir: epath.Path,
    checkpoints: checkpoint.Checkpoints,
    batches: "_Batches",
    restart_from: int | None,
) -> tuple[state_lib.TrainState, types.Tokenizer]:
    """The state and tokenizer of a checkpoint; the batches go on where it was."""
    saved = checkpoints.config(restart_from)
    restoring.check_same_run(config, saved, workdir)
    restoring.check_same_classes(batches.class_names, saved, workdir)
    mesh, step = batches.mesh, restart_from
    restored = restoring.read_run(workdir, checkpoints, config, saved, mesh, step=step)
    build.check_cache(config, restored.tokenizer)
    if not (isinstance(restored.data, dict) and type(restored.data.get("next_index")) is int):
        raise checkpoint.CheckpointError(
            f"The checkpoint of step {restored.step} in {workdir}/checkpoints is damaged (its data "
            "is no position of batches): delete it or restart from an earlier step"
        )
    batches.set_state(restored.data)
    if restart_from is None:
        logging.info("resuming at step %d", restored.step)
    else:
        removed = checkpoints.remove_after(restart_from)
        logging.info("restarting at step %d; removed: %s", restart_from, removed)
    return restored.state, restored.tokenizer


def _fill_bank(trained: restoring.Trained, workdir: epath.Path) -> None:
    """Fills the bank of a complete run, unless there is none or it is there already."""
    config, mesh, step = trained.config, trained.mesh, trained.step
    if config.transport.kind == "none":
        return
    if restoring.load_bank(workdir, config, mesh, step=step) is None:
        bank = refinement.filled_bank(trained)
        refinement.save_bank(dataclasses.replace(trained, bank=bank), workdir)


def _sheets(
    trained: restoring.Trained, captions: captions_lib.Captions | None, show: Show | None
) -> Callable[[int, state_lib.TrainState], None]:
    """Draws a few images of each class with the parameters of the moment."""
    drawer = drawing.Drawer(trained)
    num_classes = min(trained.config.data.num_classes, MAX_CLASSES)
    label = np.repeat(np.arange(num_classes), SAMPLES_PER_CLASS)

    def draw(step: int, state: state_lib.TrainState) -> None:
        if show is not None:
            drawer.trained = dataclasses.replace(trained, params=state.ema, step=step)
            prompt = captions_lib.prompt_of(label, captions)
            try:
                with stalling.longer():
                    image_uint8 = drawer.images(refiners.Identity(), prompt, seed=0)
            except drawing.NotFiniteError as error:  # no reason to lose the run
                logging.warning("no samples at step %d: %s", step, error)
                return
            if not processes.is_first():
                return
            try:
                show(step, image_uint8, label, trained.class_names)
            except OSError as error:  # nor is a picture that cannot be written
                logging.warning("no samples of step %d: %s", step, error)

    return draw


class _Batches:
    """The training batches on the mesh, one ahead, with a position that can be saved."""

    def __init__(
        self, config: build.Config, mesh: Mesh, captions: captions_lib.Captions | None
    ) -> None:
        self.mesh, self.captions = mesh, captions
        source = build.examples(config, "train")
        self.class_names = None if captions else tuple(source.label_names)
        iterator = pipeline.train_iterator(
            source,
            global_batch_size=config.data.batch_size,
            seed=config.seed,
            rows=processes.local_rows(mesh, config.data.batch_size),
            num_threads=config.data.num_threads,
        )
        self._ahead = pipeline.Ahead(iterator, self._place)

    def __iter__(self) -> Iterator[types.Batch]:
        return self

    def __next__(self) -> types.Batch:
        return next(self._ahead)

    def _place(self, rows: pipeline.NumpyBatch) -> types.Batch:
        prompt = captions_lib.prompt_of(rows["label"], self.captions)
        return processes.put_batch(types.batch_of(rows, prompt), self.mesh)

    def get_state(self) -> dict[str, Any]:
        return self._ahead.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._ahead.set_state(state)
