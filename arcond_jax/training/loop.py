"""The train loop: data, step, and at fixed intervals log, pictures, checkpoint; resumes by itself.

The order within a step is always the same: update, log, samples, save. A run that is stopped, by
SIGTERM or by force, and started again gives the numbers of one that never stopped.
"""

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import clu.metrics
import jax
import tqdm
from etils import epath

from arcond_jax import types
from arcond_jax.training import state as state_lib
from arcond_jax.training import writer as writer_lib

MAX_SKIPPED_IN_A_ROW = 10


class DivergedError(RuntimeError):
    """Ten gradients in a row were not finite."""


@runtime_checkable  # annotations are checked at run time in the tests
class BatchIterator(Protocol):
    """Endless batches already on the mesh."""

    def __next__(self) -> types.Batch: ...


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Steps between two log lines, sheets of samples, and checkpoints; None means never."""

    log: int
    samples: int | None
    checkpoint: int


def train(
    state: state_lib.TrainState,
    iterator: BatchIterator,
    *,
    step_fn: Callable[[state_lib.TrainState, types.Batch], tuple[state_lib.TrainState, dict]],
    num_train_steps: int,
    intervals: Intervals,
    save: Callable[[int, state_lib.TrainState], None],
    draw_samples: Callable[[int, state_lib.TrainState], None],
    workdir: epath.PathLike,
) -> tuple[state_lib.TrainState, bool]:
    """Runs from `state.step` to `num_train_steps`.

    Args:
      save: Called at checkpoint steps, at the last step and when told to stop.
      draw_samples: Called every `intervals.samples` steps.

    Returns:
      The state, and whether the run is complete: False after SIGTERM, with everything saved.

    Raises:
      DivergedError: ten updates in a row were skipped.
    """
    step = int(state.step)
    writers = writer_lib.make_writers(workdir, resume_at=step)
    progress = tqdm.tqdm(
        total=num_train_steps, initial=step, unit="step", disable=not sys.stderr.isatty()
    )
    interval = _Interval()
    skipped_before = 0
    with _StopSignal() as stop, progress, contextlib.ExitStack() as at_exit:
        for writer in writers:
            at_exit.callback(writer.close)
        while step < num_train_steps and not stop.received:
            state, metrics = step_fn(state, next(iterator))
            step += 1
            progress.update()
            interval.add(metrics)

            # One step late, so that this step's work is queued before the last one is waited for.
            _check_not_diverged(skipped_before, step - 1, workdir)
            skipped_before = state.skipped_in_a_row + 0

            if step % intervals.log == 0 or step == num_train_steps:
                scalars = interval.read_and_reset()
                for writer in writers:
                    writer.write_scalars(step, scalars)
                    writer.flush()
                progress.set_postfix(loss=f"{scalars['loss']:.4f}")
                if progress.disable:
                    print(f"step {step}/{num_train_steps}  loss {scalars['loss']:.4f}", flush=True)
            if intervals.samples and step % intervals.samples == 0:
                draw_samples(step, state)
            if step % intervals.checkpoint == 0 and step < num_train_steps:
                save(step, state)
    _check_not_diverged(skipped_before, step, workdir)
    complete = step >= num_train_steps
    if not complete:
        save(step, state)
    return state, complete


def _check_not_diverged(skipped: jax.Array | int, step: int, workdir: epath.PathLike) -> None:
    if int(skipped) >= MAX_SKIPPED_IN_A_ROW:
        raise DivergedError(
            f"{MAX_SKIPPED_IN_A_ROW} gradients in a row were not finite, the last at step {step}: "
            "lower training.learning_rate or training.clip_norm and restart from the last "
            f"checkpoint in {workdir}"
        )


@jax.jit  # one dispatch a step, not one per metric
def _averages(metrics: types.Metrics) -> dict[str, clu.metrics.Average]:
    return {name: clu.metrics.Average.from_model_output(x) for name, x in metrics.items()}


@jax.jit
def _merge(
    sums: dict[str, clu.metrics.Average], new: dict[str, clu.metrics.Average]
) -> dict[str, clu.metrics.Average]:
    return {name: sums[name].merge(x) for name, x in new.items()}


class _Interval:
    """Averages of the metrics since the last log line, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, clu.metrics.Average] | None = None
        self._start, self._count = time.perf_counter(), 0

    def add(self, metrics: types.Metrics) -> None:
        new = _averages(metrics)
        self._sums = new if self._sums is None else _merge(self._sums, new)
        self._count += 1

    def read_and_reset(self) -> dict[str, float]:
        scalars = {name: float(average.compute()) for name, average in (self._sums or {}).items()}
        seconds = time.perf_counter() - self._start
        scalars["steps_per_second"] = self._count / seconds
        self.__init__()
        return scalars


class _StopSignal:
    """Turns SIGTERM into a flag for as long as the loop runs."""

    def __enter__(self) -> "_StopSignal":
        self.received = False
        self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def _receive(self, *_: Any) -> None:
        self.received = True

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._previous)
