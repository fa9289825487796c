"""The train loop: data, step, and at fixed intervals log, pictures, checkpoint; resumes by itself.

The order within a step is always the same: update, scores, log, samples, save. A run that is
stopped, by a signal or by force, and started again gives the numbers of one that never stopped.
Nothing is saved while updates are being skipped: parameters that lead nowhere would push out good
ones.
"""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import clu.metrics
import jax
import jax.numpy as jnp
import tqdm
from etils import epath

from arcond_jax import types
from arcond_jax.parallel import processes
from arcond_jax.training import profiling, rates, stopping
from arcond_jax.training import state as state_lib
from arcond_jax.training import writer as writer_lib

MAX_SKIPPED_IN_A_ROW = 10
MAX_SKIPPED_SHARE = 0.1  # of all updates; looked at where a line is logged


Measure = Callable[[state_lib.TrainState, types.Batch], dict[str, float]]
Evaluate = Callable[[int, state_lib.TrainState, Callable[[], bool]], dict[str, float]]


class DivergedError(RuntimeError):
    """Ten gradients in a row, or a tenth of all, were not finite."""


@runtime_checkable  # annotations are checked at run time in the tests
class BatchIterator(Protocol):
    """Endless batches already on the mesh."""

    def __next__(self) -> types.Batch: ...


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Steps between two log lines, sheets of samples, checkpoints, scores; None means never."""

    log: int
    samples: int | None
    checkpoint: int
    evaluation: int | None = None


def train(
    state: state_lib.TrainState,
    iterator: BatchIterator,
    *,
    step_fn: Callable[[state_lib.TrainState, types.Batch], tuple[state_lib.TrainState, dict]],
    num_train_steps: int,
    intervals: Intervals,
    save: Callable[[int, state_lib.TrainState], None],
    draw_samples: Callable[[int, state_lib.TrainState], None],
    stop: stopping.Stop,
    workdir: epath.PathLike,
    work: rates.Work,
    writers: Sequence[writer_lib.Writer] = (),
    profile: profiling.Span | None = None,
    measure: Measure | None = None,
    evaluate: Evaluate | None = None,
) -> state_lib.TrainState:
    """Runs from `state.step` to `num_train_steps`.

    Args:
      save: Called at checkpoint steps, at the last step and when told to stop.
      draw_samples: Called every `intervals.samples` steps.
      stop: True once the run is told to stop.
      work: Of a step, for the rates that are logged.
      writers: Where lines are logged; closed at the end. Of one process.
      profile: Steps of which a trace is written to `workdir`/profile, by one process.
      measure: More to log, of the state and the batch at hand; called where a line is logged.
      evaluate: Scores, of the step, the state, and what says between batches whether the run is
        told to stop; called every `intervals.evaluation` steps, where a line is logged too.

    Returns:
      The state, saved; of an earlier step than the last if the run was told to stop.

    Raises:
      DivergedError: Ten updates in a row were skipped, or a tenth of all.
    """
    step = int(state.step)
    is_first, told = processes.is_first(), processes.Agreed(lambda: bool(stop))
    progress = tqdm.tqdm(
        total=num_train_steps,
        initial=step,
        unit="step",
        disable=not (is_first and sys.stderr.isatty()),
    )
    sums, speed = _Sums(), rates.Rates(work)
    trace = profiling.Trace(profile if is_first else None, workdir)
    skipped_before = 0
    with progress, trace, contextlib.ExitStack() as at_exit:
        for writer in writers:
            at_exit.callback(writer.close)
        while step < num_train_steps and not told():
            trace.before(step, state)
            batch = speed.next_of(iterator)
            state, metrics = step_fn(state, batch)
            stop.unsaved = True
            step += 1
            progress.update()
            sums.add(metrics)

            # One step late, so that this step's work is queued before the last one is waited for.
            _check_not_diverged(skipped_before, step - 1, workdir)
            skipped_before = state.skipped_in_a_row + 0

            scored = bool(intervals.evaluation) and step % intervals.evaluation == 0
            if step % intervals.log == 0 or step == num_train_steps or scored:
                scalars = sums.read_and_reset() | speed.read_and_reset(state, batch)
                _check_few_skipped(int(state.skipped), step, workdir)
                if measure is not None:
                    scalars |= measure(state, batch)
                if scored and evaluate is not None:
                    with speed.left_out():
                        scalars |= evaluate(step, state, told)
                for writer in writers:
                    writer.write_scalars(step, scalars)
                    writer.flush()
                progress.set_postfix(loss=f"{scalars['loss']:.4f}")
                if is_first and progress.disable:
                    _say(step, num_train_steps, scalars)
            if intervals.samples and step % intervals.samples == 0:
                draw_samples(step, state)
            if step % intervals.checkpoint == 0 and step < num_train_steps:
                if int(state.skipped_in_a_row) == 0:
                    save(step, state)
                else:
                    logging.warning("step %d is not saved: its update was skipped", step)
    if step < num_train_steps:
        logging.info("%s: saving step %d", stop.signal or "another process is told to stop", step)
    in_a_row = int(state.skipped_in_a_row)
    if in_a_row > 1:  # one may be chance
        raise DivergedError(_diverged(f"the last {in_a_row} gradients", workdir))
    save(step, state)
    if int(state.skipped):
        logging.warning("%d of %d updates were skipped: gradients not finite", state.skipped, step)
    return state


def _say(step: int, num_train_steps: int, scalars: Mapping[str, float]) -> None:
    left = (num_train_steps - step) / scalars["steps_per_second"] / 60
    line = f"step {step}/{num_train_steps}  loss {scalars['loss']:.4f}  {left:.0f} min left"
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(line, flush=True)


def _check_not_diverged(skipped: jax.Array | int, step: int, workdir: epath.PathLike) -> None:
    if int(skipped) >= MAX_SKIPPED_IN_A_ROW:
        what = f"{MAX_SKIPPED_IN_A_ROW} gradients in a row, the last at step {step},"
        raise DivergedError(_diverged(what, workdir))


def _check_few_skipped(skipped: int, step: int, workdir: epath.PathLike) -> None:
    if skipped > max(MAX_SKIPPED_IN_A_ROW, MAX_SKIPPED_SHARE * step):
        raise DivergedError(_diverged(f"{skipped} of {step} gradients", workdir))


def _diverged(what: str, workdir: epath.PathLike) -> str:
    return (
        f"{what} were not finite: run again with a lower training.learning_rate or "
        f"training.clip_norm, which goes on from the last checkpoint in {workdir}, or from an "
        "earlier one with --restart_from STEP"
    )


@jax.jit  # one dispatch a step, not one per metric
def _averages(metrics: types.Metrics) -> dict[str, clu.metrics.Average]:
    """Averages of what is finite: a skipped update leaves no trace in them."""
    return {
        name: clu.metrics.Average.from_model_output(x[None], mask=jnp.isfinite(x)[None])
        for name, x in metrics.items()
    }


@jax.jit
def _merge(
    sums: dict[str, clu.metrics.Average], new: dict[str, clu.metrics.Average]
) -> dict[str, clu.metrics.Average]:
    return {name: sums[name].merge(x) for name, x in new.items()}


class _Sums:
    """Averages of the metrics since the last log line, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, clu.metrics.Average] | None = None

    def add(self, metrics: types.Metrics) -> None:
        new = _averages(metrics)
        self._sums = new if self._sums is None else _merge(self._sums, new)

    def read_and_reset(self) -> dict[str, float]:
        scalars = {name: float(average.compute()) for name, average in (self._sums or {}).items()}
        self._sums = None
        return scalars
