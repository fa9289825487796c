"""The demo: every part of the library on real handwritten digits, measured against its baselines.

Trains the joint model, a diffusion-only and a codes-only one; fills the banks, calibrates, draws,
scores; writes pictures, a table, and a report with what was found, whatever it is.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from arcond_jax import build, run, types
from arcond_jax.analysis import comparison, figures, report
from arcond_jax.data import images
from arcond_jax.evaluation import paired, samples
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


def main(workdir: pathlib.Path, *, num_seeds: int, overrides: Sequence[str]) -> bool:
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
        if not run.train(build.load_config(path, overrides), directory):
            return False
        models[name] = run.restore(directory)

    config = models["joint"].config
    reference = run.reference(config, workdir)
    label = np.repeat(np.arange(config.data.num_classes), PER_CLASS)
    print("calibrating and compiling the samplers", flush=True)
    measured = comparison.compare(
        SYSTEMS,
        models,
        reference=reference,
        label=label,
        seeds=range(FIRST_SEED, FIRST_SEED + num_seeds),
    )
    write(workdir, models, measured, label, num_seeds=num_seeds)
    return True


def write(
    workdir: pathlib.Path,
    models: Mapping[str, run.Trained],
    measured: Mapping[str, comparison.Measured],
    label: Int[np.ndarray, " n"],
    *,
    num_seeds: int,
) -> None:
    """Writes samples, pictures, metrics and report, and prints the tables."""
    shown = measured[SHOWN]
    samples.write_samples(
        workdir / "samples.npz",
        shown.image_uint8,
        label,
        num_classes=models["joint"].config.data.num_classes,
        **dataclasses.asdict(shown.cards[0].settings),
    )
    grid = figures.class_grid(
        shown.image_uint8,
        label,
        num_classes=models["joint"].config.data.num_classes,
        per_class=10,
        upscale=4,
    )
    figures.write_png(workdir / "grid.png", grid)
    strip = figures.refinement_strip(window_drafts(models["joint"], seed=FIRST_SEED))
    curves = figures.training_curves(writer.read_rows(workdir / "joint" / "metrics.jsonl"))
    for name, figure in (("refinement", strip), ("curves", curves)):
        (workdir / f"{name}.png").write_bytes(figures.figure_png(figure))

    answers = [finding.answer(measured) for finding in FINDINGS]
    metrics = {"systems": comparison.as_json(measured), "findings": answers, "seeds": num_seeds}
    (workdir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    header, rows = comparison.table(measured, baseline=BASELINE)
    findings_header = ["question", "of", "difference", "relative", "expected", "found", "holds"]
    findings = [
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
    shares = {
        name: f"{one.refinement_share:.1%}"
        for name, one in measured.items()
        if one.refinement_share
    }
    cost = "Share of sampling time spent on refinement: " + ", ".join(
        f"{name} {share}" for name, share in shares.items()
    )
    print(shown.cards[0].as_text(), end="\n\n")
    print(report.table_text(header, rows), end="\n\n")
    print(report.table_text(findings_header, findings), end="\n\n")
    print(cost, end="\n\n")

    how = (
        f"Means over {num_seeds} sampling seeds of {len(label)} images; ± is the standard error of "
        "the difference paired by seed (seeds of training are not in it). FD is the Fréchet "
        "distance of the features of a small classifier to the 360 held-out images, not Inception "
        f"FID; real training images have {shown.cards[0].frechet_distance_real:.3f}. NN is the "
        "distance to the nearest training image over that of real held-out images. Drift is the "
        "energy distance of the heads' conditions to those of real prefixes, mean over positions."
    )
    drifts = [
        report.Picture(
            figures.drift_plot(
                np.mean(measured[plain].drift, axis=0), np.mean(measured[refined].drift, axis=0)
            ),
            f"Drift of the conditions at each position: {plain}, and refined.",
        )
        for plain, refined in (
            ("diffusion only, 25", "diffusion only, 25, refined"),
            ("joint, 1 evaluation", "joint, 1 evaluation, refined"),
        )
    ]
    cost_rows = [
        {
            "name": name.split(",")[0] + (", refined" if "refined" in name else ""),
            "frechet_distance": float(np.mean(one.scores("frechet_distance"))),
            "num_head_evaluations": one.cards[0].settings.num_head_evaluations,
            "standard_error": float(
                np.std(one.scores("frechet_distance"), ddof=1) / np.sqrt(num_seeds)
            ),
        }
        for name, one in measured.items()
        if name not in ("diffusion only, 25", "diffusion only, 25, refined")
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
            report.Picture(grid, f"Samples of {SHOWN}, a row per class."),
            report.Table("Systems side by side.", header, rows, how),
            report.Table("What was expected, and what was found.", findings_header, findings, cost),
            report.Picture(
                figures.quality_against_cost(
                    cost_rows, frechet_distance_real=shown.cards[0].frechet_distance_real
                ),
                "Fréchet distance against evaluations of the diffusion head per token.",
            ),
            *drifts,
            report.Picture(
                strip,
                "What each slot of the window would have drawn, from the draft made three "
                "positions ahead to the final code.",
            ),
            report.Picture(curves, "Training of the joint model."),
        ],
    )
    names = "samples.npz grid.png refinement.png curves.png metrics.json report.html"
    print(f"written to {workdir}: {names}")


def window_drafts(
    trained: run.Trained, *, seed: int
) -> UInt8[np.ndarray, "n slots height width channels"]:
    """One image per class as each slot of the window would have it, decoded from codes.

    Slot j's code at position i was drawn at position i - j; where there is none, at the first.
    """
    config = trained.config.copy_and_resolve_references()
    config.sampling.drafts = "draw"
    label = np.arange(config.data.num_classes)
    _, sampled = run.Drawer(trained, config)(refiners.Identity(), label, seed=seed)
    drafts = np.asarray(sampled.drafts)
    position = np.arange(drafts.shape[1])
    decoded = []
    for slot in range(drafts.shape[2]):
        made_at = np.maximum(position - slot, 0)
        codes = drafts[:, made_at, position - made_at]
        image = trained.tokenizer.decode(types.Tokens(codes=jax.numpy.asarray(codes)))
        decoded.append(images.image_to_uint8(np.asarray(image)))
    return np.stack(decoded, axis=1)
