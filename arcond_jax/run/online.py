"""Scores while a run trains: of images of the average weights, drawn and read on all devices.

All processes draw and read together, so none waits for another. The checkpoint with the best score
is kept apart, in `WORKDIR/best`, a working directory of its own.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from arcond_jax import atomic, build, checkpoint, digest
from arcond_jax.evaluation import reference as reference_lib
from arcond_jax.evaluation import scoring
from arcond_jax.parallel import processes, stalling
from arcond_jax.run import captions as captions_lib
from arcond_jax.run import drawing, evaluating, restoring
from arcond_jax.training import state as state_lib
from arcond_jax.transport import refiners

SEED = 0  # of all evaluations, so that scores differ by the weights alone
SCORE = "frechet_distance"  # of which the least is the best
BEST = "best"  # folder in a working directory
RECORD = "best.json"


class _StoppedError(Exception):
    """The run is told to stop."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """A network and what it read of real images."""

    network: evaluating.Network
    reference: reference_lib.Reference

    @property
    def identity(self) -> str:
        """Digest of what scores depend on beside the images that are drawn."""
        facts = {x: y for x, y in self.reference.facts.items() if not isinstance(y, float)}
        return digest.of_json([facts, reference_lib.network_facts(self.network.extractor)])[:16]


def check(config: build.Config) -> None:
    """Raises ConfigError if a run cannot be scored while it trains; reads no image."""
    settings = config.evaluation
    if settings.every is None:
        return
    for name in ("inception", "reference"):
        path = settings[name]
        if path is not None and not epath.Path(path).expanduser().exists():
            raise build.ConfigError(f"evaluation.{name} {path} does not exist")
    if settings.reference is not None and settings.inception is not None:
        return
    try:
        build.source(config, "held_out")
    except (ValueError, OSError) as error:
        raise build.ConfigError(
            f"evaluation.every needs images of the data ({error}), or both evaluation.reference "
            "and evaluation.inception"
        ) from None


def judge(config: build.Config, workdir: epath.PathLike) -> Judge | None:
    """What scores a run; None if nothing does. The small classifier is trained the first time.

    Raises:
      build.ConfigError: Fewer images than features would be drawn.
      ValueError, OSError: As of `evaluating.inception`, `evaluating.classifier` and
        `reference.read`.
    """
    settings = config.evaluation
    if settings.every is None:
        return None
    if settings.inception is not None:
        network = evaluating.inception(epath.Path(settings.inception).expanduser())
    else:
        network = evaluating.classifier(config, workdir)
    if settings.reference is not None:
        path = epath.Path(settings.reference).expanduser()
        real = reference_lib.read(path, network.extractor, mesh=network.mesh)
    else:
        real = evaluating.real(config, network)
    if real.features is None:
        raise build.ConfigError(f"evaluation.reference {settings.reference} has no statistics")
    if real.features.lack:
        raise build.ConfigError(
            f"evaluation.reference {settings.reference or 'None, the held-out images'}: "
            f"{real.features.lack}; give one of more images"
        )
    least = real.features.mean.size
    if settings.num_images < least:
        raise build.ConfigError(
            f"evaluation.num_images {settings.num_images} must be at least {least}, the "
            "features of the network: the covariance of fewer images is singular"
        )
    return Judge(network, dataclasses.replace(real, rows=None))  # of precision and recall


class Scores:
    """Draws and scores; called by the train loop."""

    def __init__(
        self,
        trained: restoring.Trained,
        by: Judge,
        captions: captions_lib.Captions | None,
        best: "Best",
    ) -> None:
        """Nothing is drawn yet; `trained` gives all but the weights."""
        data = trained.config.data
        self._trained, self._judge, self._best = trained, by, best
        self._drawer = drawing.Drawer(trained)
        self._num_classes = data.num_classes
        self._label = evaluating.labels(
            trained.config.evaluation.num_images, data.num_classes, "balanced", seed=SEED
        )
        self._prompt = captions_lib.prompt_of(self._label, captions)
        self._last = time.perf_counter()

    def __call__(
        self, step: int, state: state_lib.TrainState, told: Callable[[], bool]
    ) -> dict[str, float]:
        """Scores by name, and the share of the time since the last ones that they took.

        Empty if images are not finite, or the run is told to stop.
        """
        start, scores = time.perf_counter(), {}
        try:
            card = self._card(step, state, told)
        except (_StoppedError, drawing.NotFiniteError) as error:  # no reason to lose the run
            logging.warning("step %d is not scored: %s", step, error)
            return {}
        called = "_".join(card.names[SCORE].split(" (")[0].split())
        name = called if called.startswith("FID") else SCORE
        scores[f"evaluation/{name}"] = value = card.measurements[SCORE]
        scores["evaluation/inception_score"] = card.measurements["inception_score"]
        kept = self._best.offer(step, state, value)
        logging.info("step %d: %s %.4g%s", step, card.names[SCORE], value, kept and ", the best")
        now = time.perf_counter()
        scores["evaluation_share"] = (now - start) / (now - self._last)
        self._last = now
        return scores

    def _card(
        self, step: int, state: state_lib.TrainState, told: Callable[[], bool]
    ) -> scoring.Card:
        self._drawer.trained = dataclasses.replace(self._trained, params=state.ema, step=step)
        with stalling.longer():
            return scoring.score(
                self._drawn(told),
                self._judge.network.extractor,
                self._judge.reference,
                total=len(self._label),
                num_classes=self._num_classes,
                mesh=self._judge.network.mesh,
            )

    def _drawn(
        self, told: Callable[[], bool]
    ) -> Iterator[tuple[UInt8[np.ndarray, "b height width channels"], Int[np.ndarray, " b"]]]:
        for batch in evaluating.drawn(
            self._drawer, refiners.Identity(), self._label, seed=SEED, prompt=self._prompt
        ):
            if told():
                raise _StoppedError("the run is told to stop")
            yield batch


class Best:
    """The checkpoint with the least Frechet distance so far."""

    def __init__(
        self,
        workdir: epath.PathLike,
        trained: restoring.Trained,
        judge: Judge,
        *,
        position: Callable[[], dict[str, Any]],
        saved_config: dict[str, Any],
    ) -> None:
        """Remembers the one that is there, if it is of this run, up to its step, and comparable.

        Args:
          workdir: Of the run.
          trained: Where it begins or goes on.
          judge: What scores it.
          position: That of the batches.
          saved_config: As checkpoints hold it.
        """
        self._folder = epath.Path(workdir) / BEST
        self._tokenizer, self._config = trained.tokenizer, saved_config
        self._position = position
        settings = trained.config.evaluation.to_dict()
        del settings["every"]
        self._settings = settings | {"judge": judge.identity}
        self._values = self._remembered(trained.step)

    def _remembered(self, step: int) -> dict[int, float]:
        """Values by step, of one checkpoint, or two if a process was killed as one replaced it."""
        there = checkpoint.steps_of(f"{self._folder}/checkpoints")
        try:
            record = json.loads((self._folder / RECORD).read_text())
            comparable = record["evaluation"] == self._settings
            values = {int(name): float(x) for name, x in record["values"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        # Later ones are of steps that this run takes again, or otherwise than before.
        return {at: x for at, x in values.items() if comparable and at in there and at <= step}

    def offer(self, step: int, state: state_lib.TrainState, value: float) -> bool:
        """Keeps the checkpoint if it is the best; returns whether it is.

        Raises:
          checkpoint.CheckpointError: It cannot be written.
        """
        before = min(self._values.items(), key=lambda x: x[1], default=None)
        better = before is None or value < before[1]
        # Two machines may not come to the same number to the last bit.
        if not processes.anywhere(better) or int(state.skipped_in_a_row):
            return False
        self._values = {step: value} if before is None else {before[0]: before[1], step: value}
        restoring.keep_tokenizer(self._folder, self._tokenizer)
        with checkpoint.Checkpoints(f"{self._folder}/checkpoints", every=1, keep=1) as kept:
            kept.remove_after(step - 1)
            if processes.is_first():  # before the checkpoint: of none of them the value is unknown
                self._write(RECORD, {"values": self._values, "evaluation": self._settings})
                self._write("config.json", self._config)
            kept.save(
                step,
                state=state,
                tokenizer=None,
                data=self._position(),
                config=self._config,
                force=True,
            )
        return True

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        atomic.write_text(self._folder / name, json.dumps(value, indent=2) + "\n")
