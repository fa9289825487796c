"""What TensorAR does to samples of real small images, against baselines that are tuned as well.

    python benchmarks/tensorar.py --data digits --workdir runs/tensorar_digits
    python benchmarks/tensorar.py --data cifar10 --directory CIFAR10 --workdir runs/tensorar_cifar10

Trains a plain model of codes; from it, for equally many steps, itself, windows of several lengths
with both kinds of noise, and a drafter; and windows from scratch. Draws from all of them with
drafts fed and off, with strides, and by speculation, and scores them by a small classifier's
features. Everything lies in the workdir and goes on where it was stopped; the tables are printed,
and written to results.json. docs/tensorar.md holds what was found.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from arcond_jax import build
from arcond_jax.analysis import windows as windows_lib
from arcond_jax.configs import cifar10, digits
from arcond_jax.data import images
from arcond_jax.evaluation import card, features, frechet, moments
from arcond_jax.run import drawing, evaluating, initial, restoring, training
from arcond_jax.transport import refiners

METRICS = (
    "frechet_distance",
    "class_frechet_distance",
    "precision",
    "recall",
    "class_accuracy",
    "inception_score",
)
TUNING_SEEDS = (1000, 1001)  # far from those that are reported
# Of the plain model, from which the best by Frechet distance on the tuning seeds is reported.
TUNED = {
    "sampling.guidance_scale": (1.0, 1.15, 1.3),
    "sampling.code_temperature": (0.85, 1.0),
    "sampling.min_p": (None, 0.03, 0.1),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model: its settings beyond the plain one's, where it starts, and how it is drawn from.

    Attributes:
      settings: `section.key` to value.
      init: Arm whose weights it starts from; None for scratch.
      systems: Settings of samplers, by name.
    """

    settings: Mapping[str, Any]
    init: str | None
    systems: Mapping[str, Mapping[str, Any]]


FED_OR_NOT = {"fed": {"sampling.drafts": "feed"}, "off": {"sampling.drafts": "off"}}
STRIDES = FED_OR_NOT | {
    f"stride {s}{name}": {"sampling.stride": s, "sampling.drafts": drafts}
    for s in (2, 4)
    for name, drafts in ((", fed", "feed"), ("", "off"))
}
CATEGORICAL = {
    "tensorar.noise": "categorical",
    "tensorar.noise_schedule": "exponential",
    "tensorar.nested": False,
}
CODEBOOK = {
    "tensorar.noise": "codebook",
    "tensorar.noise_schedule": "sine",
    "tensorar.nested": False,
}


def windowed(window: int, noise: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Settings of a model in windows, its base at a tenth of the learning rate."""
    return {
        "tensorar.window": window,
        "tensorar.drafts": "noised",
        "tensorar.base_rate": 0.1,
        "tensorar.draft_weight": float(window - 1),  # the papers' mean over all entries
        **noise,
        **more,
    }


def arms(lengths: tuple[int, ...]) -> dict[str, Arm]:
    """All models, each after the one it starts from."""
    made = {
        "base": Arm({}, None, {"plain": {}}),
        "base, trained on": Arm({}, "base", {"plain": {}}),
    }
    for window, (name, noise) in itertools.product(
        lengths, (("categorical", CATEGORICAL), ("codebook", CODEBOOK))
    ):
        made[f"k = {window}, {name}"] = Arm(windowed(window, noise), "base", FED_OR_NOT)
    # What cannot hurt: nested noise, any number of drafts shown, little weight on them.
    careful = {"tensorar.drafts": "random", "tensorar.nested": True, "tensorar.draft_weight": 0.33}
    made["k = 4, careful"] = Arm(windowed(4, CATEGORICAL) | careful, "base", STRIDES)
    made["k = 4, categorical, from scratch"] = Arm(
        windowed(4, CATEGORICAL) | {"tensorar.base_rate": 1.0}, None, FED_OR_NOT
    )
    made["drafter"] = Arm(
        {"tensorar.window": 4, "tensorar.drafter": True},
        "base",
        {"speculative": {"sampling.speculative": True}},
    )
    return made


def plain_config(data: str, directory: str | None, *, windows: bool) -> build.Config:
    """The model of codes that everything is compared with."""
    config = build.config(
        model="llamagen",
        tokenizer="patches",
        data="digits" if data == "digits" else "folder",
        windows=windows,
    )
    source = digits.get_config("base") if data == "digits" else cifar10.get_config()
    for section in ("data", "tokenizer", "model", "training", "loss"):
        config[section].update(source[section].to_dict())
    config.data.directory = directory if data != "digits" else config.data.get("directory")
    config.training.update(samples_every=None, checkpoints_kept=1, weight_decay=0.05)
    config.loss.w_tensor = 1.0
    if windows:
        config.tensorar.update(depth=1, mlp_ratio=4)
    return config


def config_of(arm: Arm, args: argparse.Namespace, seed: int) -> build.Config:
    """The config of one training of an arm."""
    windows = any(name.startswith("tensorar.") for name in arm.settings)
    config = plain_config(args.data, args.directory, windows=windows)
    if args.data == "digits":
        del config.data["directory"]
    steps, rate = args.num_steps, config.training.learning_rate
    schedule: dict[str, Any] = {"training.num_train_steps": steps}
    if arm.init is not None:
        schedule = {
            "training.num_train_steps": args.num_tuning_steps,
            "training.decay": "linear",
            "training.num_warmup_steps": 0,
            # A model that is trained on has the rate of the base inside windows.
            "training.learning_rate": (1.0 if windows else 0.1) * rate,
        }
    every = {"training.checkpoint_every": 10 * steps, "seed": seed}
    for name, value in {**schedule, **every, **arm.settings, **dict(args.settings)}.items():
        section, _, key = name.rpartition(".")
        (config[section] if section else config)[key] = value
    build.check(config)
    return config


def trained(name: str, args: argparse.Namespace, made: Mapping[str, Arm], seed: int) -> float:
    """Trains an arm, and the one it starts from, unless they are; seconds, compilation included."""
    arm, workdir = made[name], folder(args, name, seed)
    timed = workdir / "seconds.json"
    if not timed.exists():
        start_from = None
        if arm.init is not None:
            trained(arm.init, args, made, seed)
            start_from = initial.Initial(folder(args, arm.init, seed), None)
        start = time.perf_counter()
        training.train(config_of(arm, args, seed), workdir, start_from=start_from)
        timed.write_text(json.dumps(time.perf_counter() - start))
    return json.loads(timed.read_text())


def folder(args: argparse.Namespace, name: str, seed: int) -> pathlib.Path:
    """Where the training of an arm lies."""
    return args.workdir / f"{name.replace(' ', '').replace(',', '_').replace('=', '')}_{seed}"


@dataclasses.dataclass
class Judge:
    """Real images, and a classifier's features of them."""

    reference: card.Reference
    by_class: dict[int, moments.Statistics]
    label: np.ndarray

    @classmethod
    def of(cls, config: build.Config, args: argparse.Namespace) -> "Judge":
        reference = evaluating.reference(config, args.workdir)
        split = build.source(config, "train")
        rows = np.arange(min(len(split), 10_000)) * len(split) // min(len(split), 10_000)
        image = np.stack([split[int(i)]["image"] for i in rows])
        image = images.Scaled(image) if image.dtype == np.uint8 else image
        read = features.read(reference.extractor, image, what="training images").features
        label = split.label[rows]
        by_class = {int(c): moments.statistics(read[label == c]) for c in np.unique(label)}
        drawn = np.repeat(np.arange(config.data.num_classes), args.per_class)
        return cls(reference, by_class, drawn)

    def scores(self, image_uint8: np.ndarray, settings: card.Settings) -> dict[str, float]:
        """The metrics of one set of samples."""
        image = images.Scaled(image_uint8)
        made = card.evaluate(image, self.label, reference=self.reference, settings=settings)
        drawn = features.read(self.reference.extractor, image, what="samples").features
        distances = [
            frechet.frechet_distance(moments.statistics(drawn[self.label == c]), real)
            for c, real in self.by_class.items()
        ]
        found = dict(made.measurements) | {"class_frechet_distance": float(np.mean(distances))}
        return {metric: float(found[metric]) for metric in METRICS}


def measured(
    model: restoring.Trained, settings: Mapping[str, Any], judge: Judge, seeds: tuple[int, ...]
) -> dict[str, Any]:
    """Scores for every sampling seed; flips, calls and time."""
    config = build.changed(model.config, settings)
    drawer = drawing.Drawer(model, config)
    scores, seconds, found = [], [], {}
    drawer.sample(refiners.Identity(), judge.label, seed=0)  # compiles
    for seed in seeds:
        start = time.perf_counter()
        sampled = jax.block_until_ready(drawer.sample(refiners.Identity(), judge.label, seed=seed))
        seconds.append(time.perf_counter() - start)
        provenance = evaluating.provenance(model, config, seed=seed)
        scores.append(judge.scores(drawer.decode(sampled.tokens), provenance))
        if sampled.drafts is not None:
            entries = windows_lib.entries(
                np.asarray(sampled.drafts), judge.label, num_codes=build.num_codes(config)
            )
            found.setdefault("flips", []).append([one.flips for one in entries])
            found.setdefault("flips_by_chance", []).append([one.chance for one in entries])
        if sampled.emitted is not None:
            emitted = np.asarray(sampled.emitted)
            found.setdefault("tokens_per_call", []).append(windows_lib.tokens_per_call(emitted))
            accepted = windows_lib.acceptance(emitted).tolist()
            found.setdefault("acceptance", []).append(accepted)
    return {
        "scores": {metric: [one[metric] for one in scores] for metric in METRICS},
        "milliseconds_per_image": 1e3 * min(seconds) / len(judge.label),
        **found,
    }


def tuned(model: restoring.Trained, judge: Judge, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, and of `TUNED` those with the least Frechet distance on the tuning seeds."""
    grid = [
        {**settings, **dict(zip(TUNED, values, strict=True))}
        for values in itertools.product(*TUNED.values())
    ]

    def distance(settings: dict[str, Any]) -> float:
        scores = measured(model, settings, judge, TUNING_SEEDS)["scores"]
        return float(np.mean(scores["frechet_distance"]))

    return min(grid, key=distance)


def run(
    args: argparse.Namespace, known: Mapping[str, Any]
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Name of the system, training seed, and what was measured, of those not known yet."""
    made = arms(args.windows)
    judge = Judge.of(config_of(made["base"], args, 0), args)
    for seed, (name, arm) in itertools.product(args.training_seeds, made.items()):
        systems = dict(arm.systems)
        if name == "base, trained on":
            systems["tuned"] = {}
        if name == "k = 4, categorical":
            systems["fed, tuned"] = FED_OR_NOT["fed"]
        for system, settings in systems.items():
            full_name = f"{name}: {system}"
            is_chosen = args.only is None or name in args.only
            if not is_chosen or str(seed) in known.get(full_name, {}):
                continue
            seconds = trained(name, args, made, seed)
            model = restoring.restore(folder(args, name, seed))
            if system.endswith("tuned"):
                settings = tuned(model, judge, settings)
            found = measured(model, settings, judge, tuple(range(args.num_sampling_seeds)))
            found |= {"settings": dict(settings), "training_seconds": seconds}
            yield full_name, seed, found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row of Markdown for each system: mean and standard error over all seeds."""
    lines = ["| system | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for name, by_seed in results.items():
        cells = []
        for metric in METRICS:
            values = np.array([one["scores"][metric] for one in by_seed.values()])
            cells.append(f"{values.mean():.3f} ± {standard_error(values):.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def standard_error(values: np.ndarray) -> float:
    """Of the mean over training seeds [rows] and sampling seeds [columns].

    Training seeds are the independent ones: with two or more it is their spread, which holds that
    of sampling; with one, that of sampling alone.
    """
    if len(values) > 1:
        means = values.mean(axis=1)
        return float(means.std(ddof=1) / np.sqrt(len(means)))
    return float(values.std(ddof=1) / np.sqrt(values.size))


def main() -> None:
    """Trains, draws, scores; prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", choices=("digits", "cifar10"), required=True)
    parser.add_argument("--directory", help="of CIFAR-10, with train/<class>/ and val/<class>/")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--num_steps", type=int, default=1200, help="of training from scratch")
    parser.add_argument("--num_tuning_steps", type=int, default=1200, help="beyond the base")
    parser.add_argument("--windows", type=int, nargs="+", default=(2, 4, 8))
    parser.add_argument("--training_seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--num_sampling_seeds", type=int, default=5)
    parser.add_argument("--per_class", type=int, default=100)
    parser.add_argument("--only", nargs="+", help="arms to draw from")
    parser.add_argument(
        "--set",
        dest="settings",
        nargs=2,
        action="append",
        default=[],
        metavar=("KEY", "JSON"),
        type=str,
        help="a setting of all models, such as model.width 64",
    )
    args = parser.parse_args()
    args.settings = [(key, json.loads(value)) for key, value in args.settings]
    args.windows = tuple(args.windows)
    if unknown := set(args.only or ()) - set(arms(args.windows)):
        parser.error(f"--only: no arm is called {', '.join(sorted(unknown))}")
    args.workdir.mkdir(parents=True, exist_ok=True)
    path = args.workdir / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for name, seed, found in run(args, results):
        results.setdefault(name, {})[str(seed)] = found
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(name, seed, {k: np.round(np.mean(v), 3) for k, v in found["scores"].items()})
    print(table(results))


if __name__ == "__main__":
    main()
