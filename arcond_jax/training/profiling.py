"""A trace of some steps, to be read by TensorBoard's profiler, XProf or Perfetto."""

import dataclasses
import logging
from typing import Any

import jax
from etils import epath


@dataclasses.dataclass(frozen=True)
class Span:
    """From the update after `start` to that of step `stop`."""

    start: int
    stop: int


class Trace:
    """Traces the steps of a span; of one that the run begins or ends within, what is of it."""

    def __init__(self, span: Span | None, workdir: epath.PathLike) -> None:
        self._span, self._folder = span, epath.Path(workdir) / "profile"
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Starts or ends; `step` is the number of updates so far, `state` what they came to."""
        if self._span is None:
            return
        inside = self._span.start <= step < self._span.stop
        if inside and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif not inside and self._running:
            jax.block_until_ready(state)
            self._end()

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        logging.info("a trace is in %s: tensorboard --logdir shows it, or xprof", self._folder)

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *unused: object) -> None:
        if self._running:
            self._end()
