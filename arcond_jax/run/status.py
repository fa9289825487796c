"""How a run is doing, read from its folder alone: while it runs, after it, from another machine."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from arcond_jax import build, checkpoint
from arcond_jax.training import writer

PAUSE = 3600.0  # seconds that compilation, a checkpoint or an evaluation may take beside steps


@dataclasses.dataclass(frozen=True)
class Status:
    """Of a run.

    Attributes:
      name: Of its config.
      num_train_steps: Where it ends.
      line: The last of its log, `step` among its names; empty before the first.
      logged_at: When that was written, in seconds since 1970; None before the first.
      log_every: Steps from line to line.
      checkpoints: Steps saved, and when.
    """

    name: str
    num_train_steps: int
    line: Mapping[str, Any]
    logged_at: float | None
    log_every: int
    checkpoints: Mapping[int, float]

    @property
    def step(self) -> int:
        """The last that is known of."""
        return max([self.line.get("step", 0), *self.checkpoints])

    @property
    def complete(self) -> bool:
        """Whether the last step is saved."""
        return self.num_train_steps in self.checkpoints

    @property
    def seconds_left(self) -> float | None:
        """At the rate of the last line; None before there is one."""
        rate = self.line.get("steps_per_second")
        return (self.num_train_steps - self.step) / rate if rate else None

    def is_silent(self, now: float) -> bool:
        """Whether lines are so long overdue that the run has probably stopped."""
        rate = self.line.get("steps_per_second")
        if self.logged_at is None or not rate:
            return False
        return now - self.logged_at > 2 * self.log_every / rate + PAUSE


def status(workdir: epath.PathLike) -> Status:
    """Reads the config, the log and the names of the checkpoints of a run.

    Raises:
      build.ConfigError: No run is there.
      ValueError: Its log or config is damaged.
    """
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text())
        name, training = config["name"], config["training"]
        num_train_steps, log_every = training["num_train_steps"], training["log_every"]
    except FileNotFoundError:
        raise build.ConfigError(f"{workdir} holds no run: arcond train makes one") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: it is no config of a run") from None
    log = workdir / "metrics.jsonl"
    rows = writer.read_rows(log)
    return Status(
        name=name,
        num_train_steps=num_train_steps,
        line=rows[-1] if rows else {},
        logged_at=float(log.stat().mtime) if rows else None,
        log_every=log_every,
        checkpoints=checkpoint.steps_of(f"{workdir}/checkpoints"),
    )
