"""Training from a config to its last step, stopped and resumed at any point."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import clu.parameter_overview
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import UInt8

from arcond_jax import build, checkpoint, types
from arcond_jax.build import saved as saved_lib
from arcond_jax.data import pipeline
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.parallel import processes
from arcond_jax.run import captions as captions_lib
from arcond_jax.run import drawing, refinement, restoring
from arcond_jax.training import loop
from arcond_jax.training import state as state_lib
from arcond_jax.transport import refiners

SAMPLES_PER_CLASS = 10  # on the sheets drawn while training

Show = Callable[[int, UInt8[np.ndarray, "n height width channels"], np.ndarray], None]


def train(
    config: build.Config,
    workdir: epath.PathLike,
    *,
    show: Show | None = None,
    init_from: epath.PathLike | None = None,
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
    workdir = epath.Path(workdir)
    # What a config can get wrong shows before anything is written.
    build.check_trained(config)
    mesh, settings = build.mesh(config), config.training
    captions = captions_lib.of_training(config)
    batches = _Batches(config, mesh, captions)
    with checkpoint.Checkpoints(
        f"{workdir}/checkpoints", every=settings.checkpoint_every, keep=settings.checkpoints_kept
    ) as checkpoints:
        state, tokenizer = _opened(config, workdir, checkpoints, batches, init_from)
        if int(state.step) >= settings.num_train_steps:
            return True

        def save(step: int, state: state_lib.TrainState) -> None:
            checkpoints.save(
                step,
                state=state,
                tokenizer=tokenizer,
                data=batches.get_state(),
                config=saved_lib.dump(config),
                force=True,
            )

        if int(state.step) == 0:
            save(0, state)  # from here on the tokenizer is never fitted again
        text = json.dumps(saved_lib.dump(config), indent=2) + "\n"
        (workdir / "config.json").write_text(text)
        logging.info("parameters:\n%s", clu.parameter_overview.get_parameter_overview(state.params))

        step_fn = build.train_step(config, mesh, tokenizer)
        trained = restoring.Trained(config, mesh, tokenizer, state.ema, state.bank, int(state.step))
        state, complete = loop.train(
            state,
            batches,
            step_fn=lambda state, batch: step_fn(state, tokenizer, batch),
            num_train_steps=settings.num_train_steps,
            intervals=loop.Intervals(
                log=settings.log_every,
                samples=settings.samples_every,
                checkpoint=settings.checkpoint_every,
            ),
            save=save,
            draw_samples=_sheets(trained, captions, show),
            workdir=workdir,
        )
        if complete:
            trained = dataclasses.replace(trained, params=state.ema)
            bank = None if state.bank is None else refinement.filled_bank(trained)
            save(settings.num_train_steps, dataclasses.replace(state, bank=bank))
        return complete


def _opened(
    config: build.Config,
    workdir: epath.Path,
    checkpoints: checkpoint.Checkpoints,
    batches: "_Batches",
    init_from: epath.PathLike | None,
) -> tuple[state_lib.TrainState, types.Tokenizer]:
    """The state and tokenizer to go on with: those of the last checkpoint, or fresh ones.

    The batches go on where the checkpoint was.
    """
    mesh = batches.mesh
    if checkpoints.latest_step() is None:
        state, tokenizer = build.train_state(config, mesh), build.tokenizer(config)
        if init_from is not None:
            params = restoring.params_of(epath.Path(init_from), config, mesh)
            state = state_lib.with_params(state, params)
    else:
        saved = checkpoints.config()
        restoring.check_same_run(config, saved, workdir)
        restored = restoring.read_run(checkpoints, config, saved, mesh)
        state, tokenizer = restored.state, restored.tokenizer
        batches.set_state(restored.data)
        logging.info("resuming at step %d", restored.step)
    return state, jax.device_put(tokenizer, mesh_lib.replicated(mesh))


def _sheets(
    trained: restoring.Trained, captions: captions_lib.Captions | None, show: Show | None
) -> Callable[[int, state_lib.TrainState], None]:
    """Draws a few images of each class with the parameters of the moment."""
    drawer = drawing.Drawer(trained)
    label = np.repeat(np.arange(trained.config.data.num_classes), SAMPLES_PER_CLASS)

    def draw(step: int, state: state_lib.TrainState) -> None:
        if show is not None:
            drawer.trained = dataclasses.replace(trained, params=state.ema, step=step)
            prompt = captions_lib.prompt_of(label, captions)
            show(step, drawer.images(refiners.Identity(), prompt, seed=0), label)

    return draw


class _Batches:
    """The training batches on the mesh, with a position that can be saved."""

    def __init__(
        self, config: build.Config, mesh: Mesh, captions: captions_lib.Captions | None
    ) -> None:
        self.mesh, self._captions = mesh, captions
        self._iterator: Any = pipeline.train_iterator(
            build.source(config, "train"),
            global_batch_size=config.data.batch_size,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def __iter__(self) -> Iterator[types.Batch]:
        return self

    def __next__(self) -> types.Batch:
        rows = next(self._iterator)
        prompt = captions_lib.prompt_of(rows["label"], self._captions)
        return processes.put_batch(types.Batch(rows["image"], prompt), self.mesh)

    def get_state(self) -> dict[str, Any]:
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)
