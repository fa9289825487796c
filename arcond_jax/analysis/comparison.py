"""Samplers side by side: the same labels and seeds for all, so that differences are paired.

Each system is a trained model with its own sampling and transport settings. Seeds are the outer
loop and systems the inner one, so that a busy moment of the machine does not fall on one system.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Float, Int, UInt8

from arcond_jax import build, types
from arcond_jax import config as config_lib
from arcond_jax.data import images
from arcond_jax.evaluation import card, paired
from arcond_jax.parallel import processes, stalling
from arcond_jax.run import drawing, evaluating, refinement, restoring
from arcond_jax.transport import drift

METRICS = (
    "frechet_distance",
    "frechet_distance_train",
    "frechet_distance_pixels",
    "precision",
    "recall",
    "class_accuracy",
    "nearest_neighbour_ratio",
)


@dataclasses.dataclass(frozen=True)
class System:
    """A row of the comparison.

    Attributes:
      name: Of the row.
      model: Which trained model it samples from.
      settings: `section.key` to value, over the model's own config.
    """

    name: str
    model: str
    settings: Mapping[str, Any]


def settings(config: build.Config, overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of a system from `section.key=value` strings, checked against a model's config.

    Raises:
      build.ConfigError: An unknown key or a value that cannot be used.
    """
    build.with_overrides(config, overrides)
    return dict(config_lib.parse(text) for text in overrides)


@dataclasses.dataclass
class Measured:
    """What was measured of a system.

    Attributes:
      cards: One evaluation card per seed.
      milliseconds: Sampling time per image, one value per seed, compilation left out.
      drift: Energy distance of the conditions the heads saw to those of real held-out prefixes,
        per seed and slot.
      drift_drawn: The same for the conditions as drawn, before refinement.
      refinement_share: Time of the refiner alone over the whole sampling time.
      image_uint8: Images of the first seed.
    """

    cards: list[card.EvaluationCard]
    milliseconds: list[float]
    drift: list[Float[np.ndarray, " slots"]]
    drift_drawn: list[Float[np.ndarray, " slots"]]
    refinement_share: float
    image_uint8: UInt8[np.ndarray, "n height width channels"]

    def metrics(self) -> list[str]:
        """Which of `METRICS` the cards have: large images have no distance of pixels."""
        return [metric for metric in METRICS if metric in self.cards[0].measurements]

    def scores(self, metric: str) -> list[float]:
        """One value per seed: of a metric of the card, or of "drift", its mean over slots."""
        if metric == "drift":
            return [float(np.mean(one)) for one in self.drift]
        return [one.measurements[metric] for one in self.cards]


def compare(
    systems: Sequence[System],
    models: Mapping[str, restoring.Trained],
    *,
    reference: card.Reference,
    label: Int[np.ndarray, " n"],
    seeds: Sequence[int],
) -> dict[str, Measured]:
    """Samples and scores every system with every seed."""
    # XLA compiles one program on one core, so two threads halve the wait; several processes must
    # run their programs in one order.
    num_threads = 1 if processes.are_several() else 2
    with stalling.longer(), concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        prepared = list(
            pool.map(lambda system: _Prepared(system, models[system.model], label), systems)
        )
    ideal = {name: refinement.conditions(trained, "held_out") for name, trained in models.items()}
    progress = tqdm.tqdm(
        total=len(seeds) * len(systems),
        desc="sampling",
        unit="set",
        mininterval=1.0,
        disable=not processes.is_first(),
    )
    with progress:
        for seed in seeds:
            for one in prepared:
                one.draw_and_score(seed, reference, ideal[one.system.model])
                progress.update()
    return {one.system.name: one.measured() for one in prepared}


class _Prepared:
    """A system with its refiner calibrated and its loop compiled."""

    def __init__(
        self, system: System, trained: restoring.Trained, label: Int[np.ndarray, " n"]
    ) -> None:
        self.system = system
        config = build.changed(trained.config, system.settings)
        self._trained, self._config, self._label = trained, config, label
        self._refiner = refinement.calibrate(trained, config)
        self._drawer = drawing.Drawer(trained, config, trace=True)
        self._drawer(self._refiner, label, seed=0)
        self._cards, self._milliseconds, self._images = [], [], []
        self._drift, self._drift_drawn = [], []

    def draw_and_score(
        self,
        seed: int,
        reference: card.Reference,
        ideal: tuple[Float[np.ndarray, "m l d"], Int[np.ndarray, " m"]],
    ) -> None:
        start = time.perf_counter()
        image_uint8, sampled = self._drawer(self._refiner, self._label, seed=seed)
        seconds = time.perf_counter() - start
        self._milliseconds.append(1e3 * seconds / len(self._label))
        self._images.append(image_uint8)
        self._cards.append(
            card.evaluate(
                images.Scaled(image_uint8),
                self._label,
                reference=reference,
                settings=evaluating.provenance(self._trained, self._config, seed=seed),
            )
        )
        assert sampled.cond is not None  # traced
        drawn, refined = processes.fetch(sampled.cond)
        self._drift_drawn.append(_drift(drawn, self._label, ideal))
        unrefined = self._config.transport.kind == "none"
        self._drift.append(
            self._drift_drawn[-1] if unrefined else _drift(refined, self._label, ideal)
        )
        self._cond = drawn

    def measured(self) -> Measured:
        refiner = processes.fetch(self._refiner)
        seconds = refiner_seconds(refiner, self._cond, self._label)
        total = float(np.median(self._milliseconds)) * len(self._label) / 1e3
        return Measured(
            cards=self._cards,
            milliseconds=self._milliseconds,
            drift=self._drift,
            drift_drawn=self._drift_drawn,
            refinement_share=0.0 if self._config.transport.kind == "none" else seconds / total,
            image_uint8=self._images[0],
        )


def _drift(
    cond: Float[np.ndarray, "n l d"],
    label: Int[np.ndarray, " n"],
    ideal: tuple[Float[np.ndarray, "m l d"], Int[np.ndarray, " m"]],
) -> Float[np.ndarray, " l"]:
    return drift.energy_distance(cond, ideal[0], label=label, reference_label=ideal[1])


def refiner_seconds(
    refiner: types.Refiner, cond: Float[np.ndarray, "n l d"], label: Int[np.ndarray, " n"]
) -> float:
    """Time of the refiner alone over all slots, the best of five runs."""

    @jax.jit
    def refine_all(refiner, cond, label):
        def body(state, inputs):
            slot, slot_cond = inputs
            refined, state = refiner(slot_cond, state, slot=slot, label=label)
            return state, refined

        slots = jnp.arange(cond.shape[1])
        return jax.lax.scan(body, refiner.init(label), (slots, jnp.moveaxis(cond, 1, 0)))

    args = refiner, jnp.asarray(cond), jnp.asarray(label)
    jax.block_until_ready(refine_all(*args))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(refine_all(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def table(
    measured: Mapping[str, Measured], *, baseline: str
) -> tuple[list[str], list[list[str | float | None]]]:
    """Header and rows: means over seeds, and the paired difference to the baseline's distance."""
    header = [
        "system",
        "head evals",
        "ms/image",
        "FD",
        "FD - baseline",
        "FD train",
        "FD pixels",
        "precision",
        "recall",
        "accuracy",
        "NN",
        "drift",
    ]
    rows = []
    for name, one in measured.items():
        difference = None
        if name != baseline:
            difference = difference_text(one, measured[baseline])
        means = {metric: float(np.mean(one.scores(metric))) for metric in one.metrics()}
        nearest = means.get("nearest_neighbour_ratio")
        rows.append(
            [
                name,
                f"{head_evaluations(one)}",
                f"{np.median(one.milliseconds):.2f}",
                means["frechet_distance"],
                difference,
                means["frechet_distance_train"],
                means.get("frechet_distance_pixels"),
                means["precision"],
                means["recall"],
                means["class_accuracy"],
                None if nearest is None else f"{nearest:.2f}",
                float(np.mean(one.drift)),
            ]
        )
    return header, rows


def head_evaluations(one: Measured) -> int:
    """Evaluations of the diffusion head for each token; 0 without one."""
    return int(one.cards[0].settings.sampling.get("num_head_evaluations") or 0)


def difference_text(a: Measured, b: Measured, metric: str = "frechet_distance") -> str:
    """`mean ± standard error` of a - b over the seeds."""
    mean, error = paired.paired_difference(a.scores(metric), b.scores(metric))
    return f"{mean:+.3f} ± {error:.3f}"


def as_json(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Everything measured, ready for a JSON file."""
    return {
        name: {
            "settings": dataclasses.asdict(one.cards[0].settings),
            "metrics": {metric: one.scores(metric) for metric in one.metrics()},
            "milliseconds_per_image": one.milliseconds,
            "drift_per_slot": np.mean(one.drift, axis=0).tolist(),
            "drift_per_slot_before_refinement": np.mean(one.drift_drawn, axis=0).tolist(),
            "refinement_share_of_time": one.refinement_share,
        }
        for name, one in measured.items()
    }
