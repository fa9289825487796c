"""The demo: every part of the library on real handwritten digits, measured against its baselines.

Trains the joint model, a diffusion-only and a codes-only one; fills the banks, calibrates, draws,
scores; writes pictures, a table, and a report with what was found, whatever it is.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from arcond_jax import atomic, build
from arcond_jax.analysis import comparison, figures, report, window_report
from arcond_jax.evaluation import paired, samples
from arcond_jax.run import drawing, evaluating, restoring, training
from arcond_jax.training import writer
from arcond_jax.transport import refiners

MODELS = {"joint": "digits:joint", "diffusion": "digits:ar", "codes": "digits:tensorar"}
PER_CLASS = 100
FIRST_SEED = 0  # tuning used seeds 100 and up

PLAIN = {"transport.kind": "none"}
REFINED = {"transport.kind": "stored"}
FIVE = {
    "sampling.solver": "ancestral",
    "sampling.num_head_evaluations": 5,
    "sampling.warm_start": None,
}

# Temperature and guidance were chosen by the sum of both Frechet distances (held out, train) over a
# grid on sampling seeds 100 to 103, for the plain and the refined sampler separately.
SYSTEMS = (
    comparison.System("joint, 1 evaluation", "joint", PLAIN),
    comparison.System("joint, 1 evaluation, refined", "joint", REFINED),
    comparison.System("joint, 5 evaluations", "joint", FIVE | PLAIN),
    comparison.System("joint, 5 evaluations, refined", "joint", FIVE | REFINED),
    comparison.System("diffusion only, 25", "diffusion", PLAIN),
    comparison.System("diffusion only, 25, refined", "diffusion", REFINED),
    comparison.System(
        "diffusion only, 25, tuned",
        "diffusion",
        PLAIN | {"sampling.latent_temperature": 1.12, "sampling.guidance_scale": 1.3},
    ),
    comparison.System(
        "diffusion only, 25, tuned, refined",
        "diffusion",
        REFINED | {"sampling.latent_temperature": 1.06, "sampling.guidance_scale": 1.15},
    ),
    comparison.System(
        "diffusion only, 10, tuned",
        "diffusion",
        PLAIN | {"sampling.num_head_evaluations": 10, "sampling.latent_temperature": 1.06},
    ),
    comparison.System(
        "diffusion only, 5, tuned",
        "diffusion",
        PLAIN | {"sampling.num_head_evaluations": 5, "sampling.latent_temperature": 1.1},
    ),
    comparison.System("codes only", "codes", PLAIN | {"sampling.code_temperature": 0.8}),
)
BASELINE = "diffusion only, 25, tuned"
SHOWN = "joint, 1 evaluation, refined"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A paired difference between two systems, and what is expected of it.

    Attributes:
      expected: "lower" (by more than two standard errors), "not higher" or "about equal".
      metric: "frechet_distance", or "drift" for the energy distance of the conditions.
    """

    question: str
    system: str
    against: str
    expected: str
    metric: str = "frechet_distance"

    def answer(self, measured: Mapping[str, comparison.Measured]) -> dict[str, Any]:
        """The difference, its standard error over seeds, and whether it is as expected."""
        a, b = (measured[name].scores(self.metric) for name in (self.system, self.against))
        mean, error = paired.paired_difference(a, b)
        found = "no difference"
        if abs(mean) > 2 * error:
            found = "lower" if mean < 0 else "higher"
        small = abs(mean) < 0.015  # the noise of a few hundred reference images
        holds = {
            "lower": found == "lower",
            "not higher": found != "higher" or small,
            "about equal": found == "no difference" or small,
        }
        return dataclasses.asdict(self) | {
            "difference": mean,
            "standard_error": error,
            "relative": mean / float(np.mean(b)),
            "found": found,
            "holds": holds[self.expected],
        }


FINDINGS = (
    Finding(
        "Does refinement help diffusion-only sampling at temperature 1?",
        "diffusion only, 25, refined",
        "diffusion only, 25",
        "lower",
    ),
    Finding(
        "Does it still help once temperature and guidance are tuned for both?",
        "diffusion only, 25, tuned, refined",
        "diffusion only, 25, tuned",
        "about equal",
    ),
    Finding(
        "Is joint at 1 head evaluation better than diffusion only at 5?",
        "joint, 1 evaluation",
        "diffusion only, 5, tuned",
        "lower",
    ),
    Finding(
        "Is it at least as good as diffusion only at 10?",
        "joint, 1 evaluation",
        "diffusion only, 10, tuned",
        "not higher",
    ),
    Finding(
        "Does refinement help joint at 1 head evaluation?",
        "joint, 1 evaluation, refined",
        "joint, 1 evaluation",
        "lower",
    ),
    Finding("And at 5?", "joint, 5 evaluations, refined", "joint, 5 evaluations", "lower"),
    Finding(
        "Does joint at 1 evaluation beat codes alone, which need none?",
        "joint, 1 evaluation",
        "codes only",
        "lower",
    ),
    Finding(
        "Are refined conditions nearer to real ones (diffusion only, temperature 1)?",
        "diffusion only, 25, refined",
        "diffusion only, 25",
        "lower",
        "drift",
    ),
    Finding(
        "Are they for joint at 1 head evaluation?",
        "joint, 1 evaluation, refined",
        "joint, 1 evaluation",
        "lower",
        "drift",
    ),
)


def main(workdir: epath.Path, *, num_seeds: int, overrides: Sequence[str]) -> bool:
    """Runs all of it; returns False if it was told to stop while training.

    Args:
      workdir: Where everything goes; a demo that was stopped there goes on.
      num_seeds: Sampling seeds, at least 2.
      overrides: `section.key=value` for all three models.

    Raises:
      ValueError: Fewer than two seeds.
    """
    if num_seeds < 2:
        raise ValueError(f"{num_seeds} seeds give no standard error: use at least 2")
    models = {}
    for name, path in MODELS.items():
        print(f"training {name} ({path})", flush=True)
        directory = workdir / name
        directory.mkdir(parents=True, exist_ok=True)
        if not training.train(build.load_config(path, overrides), directory):
            return False
        models[name] = restoring.restore(directory)

    config = models["joint"].config
    reference = evaluating.reference(config, workdir)
    label = np.repeat(np.arange(config.data.num_classes, dtype=np.int32), PER_CLASS)
    print("calibrating and compiling the samplers", flush=True)
    measured = comparison.compare(
        SYSTEMS,
        models,
        reference=reference,
        label=label,
        seeds=range(FIRST_SEED, FIRST_SEED + num_seeds),
    )
    answers = [finding.answer(measured) for finding in FINDINGS]
    metrics = {"systems": comparison.as_json(measured), "findings": answers, "seeds": num_seeds}
    atomic.write_text(workdir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    pictures = draw_pictures(workdir, models["joint"], measured[SHOWN].image_uint8, label)
    tables = tables_of(measured, answers, num_seeds=num_seeds, num_images=len(label))
    _write_samples(workdir, config, measured[SHOWN], label)
    _write_report(workdir, measured, pictures, tables, num_seeds=num_seeds)
    print(measured[SHOWN].cards[0].as_text(), end="\n\n")
    for table in tables:
        print(report.table_text(table.header, table.rows), end="\n\n")
    print(tables[-1].note, end="\n\n")
    names = "samples.npz grid.png refinement.png curves.png metrics.json report.html"
    print(f"written to {workdir}: {names}")
    return True


def _write_samples(
    workdir: epath.Path,
    config: build.Config,
    shown: comparison.Measured,
    label: Int[np.ndarray, " n"],
) -> None:
    samples.write_samples(
        workdir / "samples.npz",
        shown.image_uint8,
        label,
        num_classes=config.data.num_classes,
        **dataclasses.asdict(shown.cards[0].settings),
    )


def draw_pictures(
    workdir: epath.Path,
    trained: restoring.Trained,
    image_uint8: UInt8[np.ndarray, "n height width channels"],
    label: Int[np.ndarray, " n"],
) -> dict[str, Any]:
    """Draws the samples of a system, drafts of the joint model and its training, and writes them.

    Returns:
      "grid", an image; "refinement" and "curves", figures.
    """
    num_classes = trained.config.data.num_classes
    grid = figures.class_grid(image_uint8, label, num_classes=num_classes, per_class=10, upscale=4)
    figures.write_png(workdir / "grid.png", grid)
    rows = writer.read_rows(workdir / "joint" / "metrics.jsonl")
    pictures = {
        "refinement": figures.refinement_strip(window_drafts(trained, seed=FIRST_SEED)),
        "curves": figures.training_curves(rows),
    }
    for name, figure in pictures.items():
        with atomic.file(workdir / f"{name}.png") as file:
            file.write(figures.figure_png(figure))
    return pictures | {"grid": grid}


def tables_of(
    measured: Mapping[str, comparison.Measured],
    answers: Sequence[Mapping[str, Any]],
    *,
    num_seeds: int,
    num_images: int,
) -> tuple[report.Table, report.Table]:
    """The systems side by side, and what was expected of them and found."""
    real = measured[SHOWN].cards[0].measurements["frechet_distance_real"]
    how = (
        f"Means over {num_seeds} sampling seeds of {num_images} images; ± is the standard error of "
        "the difference paired by seed (seeds of training are not in it). FD is the Fréchet "
        "distance of the features of a small classifier to the 360 held-out images, not Inception "
        f"FID; real training images have {real:.3f}. NN is the distance to the nearest training "
        "image over that of real held-out images. Drift is the energy distance of the heads' "
        "conditions to those of real prefixes, mean over positions."
    )
    systems = report.Table(
        "Systems side by side.", *comparison.table(measured, baseline=BASELINE), how
    )
    header = ["question", "of", "difference", "relative", "expected", "found", "holds"]
    rows = [
        [
            answer["question"],
            "drift" if answer["metric"] == "drift" else "FD",
            f"{answer['difference']:+.3f} ± {answer['standard_error']:.3f}",
            f"{answer['relative']:+.0%}",
            answer["expected"],
            answer["found"],
            "yes" if answer["holds"] else "NO",
        ]
        for answer in answers
    ]
    shares = (
        f"{name} {one.refinement_share:.1%}"
        for name, one in measured.items()
        if one.refinement_share
    )
    cost = f"Share of sampling time spent on refinement: {', '.join(shares)}"
    return systems, report.Table("What was expected, and what was found.", header, rows, cost)


def _write_report(
    workdir: epath.Path,
    measured: Mapping[str, comparison.Measured],
    pictures: Mapping[str, Any],
    tables: tuple[report.Table, report.Table],
    *,
    num_seeds: int,
) -> None:
    real = measured[SHOWN].cards[0].measurements["frechet_distance_real"]
    cost_rows = [
        {
            "name": name.split(",")[0] + (", refined" if "refined" in name else ""),
            "frechet_distance": float(np.mean(one.scores("frechet_distance"))),
            "num_head_evaluations": comparison.head_evaluations(one),
            "standard_error": float(
                np.std(one.scores("frechet_distance"), ddof=1) / np.sqrt(num_seeds)
            ),
        }
        for name, one in measured.items()
        if name not in ("diffusion only, 25", "diffusion only, 25, refined")
    ]
    drifts = [
        report.Picture(
            figures.drift_plot(*(np.mean(measured[x].drift, axis=0) for x in (name, refined))),
            f"Drift of the conditions at each position: {name}, and refined.",
        )
        for name, refined in (
            ("diffusion only, 25", "diffusion only, 25, refined"),
            ("joint, 1 evaluation", "joint, 1 evaluation, refined"),
        )
    ]
    report.write_report(
        workdir / "report.html",
        title="arcond_jax on handwritten digits",
        sections=[
            report.Text(
                "Three models of 8x8 digits, 1,200 updates each: codes and latents together "
                "(joint), latents with the diffusion loss only, codes only. Conditions are refined "
                "by optimal transport before any head sees them."
            ),
            report.Picture(pictures["grid"], f"Samples of {SHOWN}, a row per class."),
            *tables,
            report.Picture(
                figures.quality_against_cost(cost_rows, frechet_distance_real=real),
                "Fréchet distance against evaluations of the diffusion head per token.",
            ),
            *drifts,
            report.Picture(
                pictures["refinement"],
                "What each entry of the window would have drawn, from the draft made three "
                "positions ahead to the final code.",
            ),
            report.Picture(pictures["curves"], "Training of the joint model."),
        ],
    )


def window_drafts(
    trained: restoring.Trained, *, seed: int
) -> UInt8[np.ndarray, "n entries height width channels"]:
    """One image per class as each entry of the window would have it, decoded from codes."""
    drawer = drawing.Drawer(trained, window_report.with_drafts(trained.config))
    label = np.arange(trained.config.data.num_classes, dtype=np.int32)
    sampled = drawer.sample(refiners.Identity(), label, seed=seed)
    return window_report.decoded(drawer, np.asarray(sampled.drafts))
