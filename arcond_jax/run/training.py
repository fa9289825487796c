"""Training from a config to its last step, stopped and resumed at any point."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import clu.parameter_overview
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from arcond_jax import build, checkpoint, sharding, types
from arcond_jax.data import pipeline
from arcond_jax.run import drawing, refinement, restoring
from arcond_jax.run.restoring import Trained
from arcond_jax.training import loop
from arcond_jax.training import state as state_lib
from arcond_jax.transport import refiners

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
                state = state_lib.with_params(state, restoring.params_of(init_from, config, mesh))
        else:
            saved = checkpoints.config()
            restoring.check_same_run(config, saved, workdir)
            abstract_state, abstract_tokenizer = restoring.abstract_run(config, saved, mesh)
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
        drawer = drawing.Drawer(
            Trained(config, mesh, tokenizer, state.ema, state.bank, int(state.step))
        )

        def draw_samples(step: int, state: state_lib.TrainState) -> None:
            if show is not None:
                drawer.trained = dataclasses.replace(drawer.trained, params=state.ema, step=step)
                label = np.repeat(np.arange(config.data.num_classes), SAMPLES_PER_CLASS)
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
            bank = None if state.bank is None else refinement.filled_bank(trained)
            save(config.training.num_train_steps, dataclasses.replace(state, bank=bank))
        return complete


class _MeshBatches:
    """The process's numpy batches as global arrays on the mesh."""

    def __init__(self, iterator: Any, mesh: Mesh) -> None:
        self._iterator, self._mesh = iterator, mesh

    def __next__(self) -> types.Batch:
        return sharding.put_batch(types.Batch(**next(self._iterator)), self._mesh)
