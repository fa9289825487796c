"""Scores of a set of images against a reference, with a card that says what each number is.

    inception = inception_lib.load("weights/inception")
    real = reference.read("VIRTUAL_imagenet256_labeled.npz", inception)
    card = scoring.score(image_sets.Npz("samples.npz"), inception, real)
    print(card.as_text())

"FID" is a name for one number alone: of 50,000 images, by the published weights of Inception. Of
fewer images it is FID-10k and the like, and of anything else a Frechet distance.
"""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from arcond_jax.evaluation import card as card_lib
from arcond_jax.evaluation import features as features_lib
from arcond_jax.evaluation import (
    frechet,
    image_sets,
    inception,
    kernel_distance,
    moments,
    neighbours,
    precision_recall,
    summary,
)
from arcond_jax.evaluation import reference as reference_lib

OFFICIAL_COUNT = 50_000
PER_CLASS = 2  # rows of a class for each feature, below which it has no Frechet distance of its own
SHOWN = 12  # digits of a sha256

Setting = image_sets.Setting


@dataclasses.dataclass(frozen=True)
class Card:
    """What was measured, and everything that it depends on.

    Attributes:
      samples: Where the images are from and how they were made.
      measured_with: The network, and settings of the metrics.
      reference: What is known of the real images.
      measurements: Numbers by name: "frechet_distance", "spatial_frechet_distance",
        "inception_score", "precision", "recall", "kernel_distance", "kernel_distance_deviation",
        "class_accuracy", "class_frechet_distance"; those that could be measured.
      names: What each of them is called: FID, FID-10k, or a Frechet distance.
      notes: A line for each that could not be measured, and why.
    """

    samples: Mapping[str, Setting]
    measured_with: Mapping[str, Setting]
    reference: Mapping[str, Setting]
    measurements: Mapping[str, float]
    names: Mapping[str, str]
    notes: tuple[str, ...]

    def as_json(self) -> str:
        """The card as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)

    def as_text(self) -> str:
        """The card as aligned lines."""
        return card_lib.sections_text(
            {
                "Samples": {name: f"{x}" for name, x in self.samples.items()},
                "Measured with": {name: f"{x}" for name, x in self.measured_with.items()},
                "Reference": {name: f"{x}" for name, x in self.reference.items()},
                "Metrics": {
                    self.names[name]: f"{x:10.4f}" for name, x in self.measurements.items()
                },
            },
            self.notes,
        )


def score(
    images: summary.Images,
    extractor: features_lib.Features,
    reference: reference_lib.Reference,
    *,
    samples: Mapping[str, Setting] | None = None,
    total: int | None = None,
    num_classes: int | None = None,
    mesh: Mesh | None = None,
    options: "Options | None" = None,
) -> Card:
    """Measures a set of images, read once and batch by batch.

    With several processes all have to call it, with the same images; each reads its part of them,
    and all get the card.

    Args:
      images: A set, or batches of uint8 images and labels in order.
      extractor: The network; that of the reference.
      reference: Real images.
      samples: How the images were made, for the card, beside what a set says of itself.
      total, num_classes, mesh: As of `summary.summarise`.
      options: Of metrics; None for those of `Options`.

    Raises:
      ValueError: As of `summary.summarise`; or the reference is of another network.
    """
    options = options or Options()
    reference_lib.check_network(reference, extractor, where="the reference")
    found = summary.summarise(
        images,
        extractor,
        what="samples",
        total=total,
        mesh=mesh,
        keep=0 if reference.rows is None else None,
        num_classes=num_classes,
        width=reference.width,
        image_shape=reference.image_shape,
    )
    measurements, notes = _measured(found, reference, options)
    said = images.facts if isinstance(images, image_sets.ImageSet) else {}
    return Card(
        samples={**said, **(samples or {}), **_about(found)},
        measured_with={**reference_lib.network_facts(extractor), **_how(found, reference, options)},
        reference=reference.facts,
        measurements=measurements,
        names=names(extractor, found.count, measurements),
        notes=tuple(notes),
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """How metrics are computed.

    Attributes:
      distances: Type of those of precision and recall; ADM's evaluator has "float16".
      singular: Whether a covariance of fewer images than features is used; such a Frechet distance
        is far from what it would be with more.
      num_subsets, subset_size: Of the kernel distance.
    """

    distances: neighbours.Dtype = "float32"
    singular: bool = False
    num_subsets: int = kernel_distance.NUM_SUBSETS
    subset_size: int = kernel_distance.SUBSET_SIZE


def names(
    extractor: features_lib.Features, count: int, measurements: Mapping[str, float]
) -> dict[str, str]:
    """What each number is called."""
    if isinstance(extractor, inception.Inception) and extractor.published:
        few = "" if count == OFFICIAL_COUNT else f"-{_short(count)}"
        marks, score_name = {"": f"FID{few}", "s": f"sFID{few}", "k": "KID"}, "Inception Score"
        different = [
            f"{value}{what}"
            for value, usual, what in (
                (extractor.preprocessing, "tf", " preprocessing"),
                (extractor.dtype, "float32", ""),
            )
            if value != usual
        ]
        how = f" ({', '.join(different)})" if different else ""
        score_name += how
    else:
        marks = {"": "Frechet distance", "s": "spatial Frechet distance", "k": "kernel distance"}
        why, score_name = "other features", "inception score of these logits"
        if isinstance(extractor, inception.Inception):
            why = f"weights of sha256 {extractor.sha256[:SHOWN]}"
            score_name = "inception score of these weights"
        how = f" (not FID: {why})"
    called = {
        "frechet_distance": marks[""] + how,
        "spatial_frechet_distance": marks["s"] + how.replace("not FID", "not sFID"),
        "inception_score": score_name,
        "precision": "precision",
        "recall": "recall",
        "kernel_distance": marks["k"] + how.replace("not FID", "not KID"),
        "kernel_distance_deviation": "  deviation between subsets",
        "class_accuracy": "class accuracy",
        "class_frechet_distance": "mean Frechet distance of a class",
    }
    return {name: called[name] for name in measurements}


def _measured(
    found: summary.Summary, reference: reference_lib.Reference, options: Options
) -> tuple[dict[str, float], list[str]]:
    values: dict[str, float] = {}
    notes: list[str] = []
    for name, ours, theirs in (
        ("frechet_distance", found.features, reference.features),
        ("spatial_frechet_distance", found.spatial, reference.spatial),
    ):
        few = None if options.singular else _too_few(ours, theirs)
        if ours is None or theirs is None or few:
            if few or name == "frechet_distance":
                notes.append(f"no {name.replace('_', ' ')}: {few or 'no statistics to compare'}")
        else:
            values[name] = frechet.frechet_distance(ours, theirs)
    values["inception_score"] = found.inception_score
    least = precision_recall.NUM_NEIGHBOURS
    if found.rows is None or reference.rows is None:
        notes.append("no precision, recall and KID: the reference holds no images or features")
    elif min(len(found.rows), len(reference.rows)) <= least:
        notes.append(f"no precision, recall and KID: they need more than {least} images")
    else:
        values["precision"], values["recall"] = precision_recall.precision_recall(
            found.rows, reference.rows, dtype=options.distances
        )
        kernel = kernel_distance.kernel_distance(
            found.rows,
            reference.rows,
            num_subsets=options.num_subsets,
            subset_size=options.subset_size,
        )
        values["kernel_distance"] = kernel.mean
        values["kernel_distance_deviation"] = kernel.deviation
        labels = found.label, reference.label
        if labels[0] is not None and labels[1] is not None:
            by_class = class_frechet_distance(found.rows, labels[0], reference.rows, labels[1])
            if by_class is not None:
                values["class_frechet_distance"] = by_class
    if found.per_class is None:
        notes.append("no figures by class: the samples have no labels")
    if found.class_accuracy is not None:
        values["class_accuracy"] = found.class_accuracy
    if any("fewer than" in note for note in notes):
        notes.append(f"what remains: {', '.join(x.replace('_', ' ') for x in values)}")
    return values, notes


def class_frechet_distance(
    features: Float[np.ndarray, "n d"],
    label: Int[np.ndarray, " n"],
    reference_features: Float[np.ndarray, "m d"],
    reference_label: Int[np.ndarray, " m"],
) -> float | None:
    """Mean over classes of the Frechet distance within each.

    None unless every class has `PER_CLASS` images for each feature on both sides.
    """
    classes = np.union1d(label, reference_label)
    least = PER_CLASS * features.shape[1]
    distances = []
    for one in classes:
        ours, theirs = features[label == one], reference_features[reference_label == one]
        if min(len(ours), len(theirs)) < least:
            return None
        pair = moments.statistics(ours), moments.statistics(theirs)
        distances.append(frechet.frechet_distance(*pair))
    return float(np.mean(distances))


def _too_few(*both: moments.Statistics | None) -> str | None:
    for one in both:
        if one is not None and one.count is not None and one.count < one.mean.size:
            return (
                f"{one.count} images are fewer than the {one.mean.size} features, so their "
                "covariance is singular"
            )
    return None


def _about(found: summary.Summary) -> dict[str, Setting]:
    facts: dict[str, Setting] = {
        "images": found.count,
        "image size": "x".join(map(str, found.image_shape)),
    }
    if found.per_class is not None:
        low, high = found.per_class
        facts["of each class"] = f"{low}" if low == high else f"{low} to {high}"
    return facts


def _how(
    found: summary.Summary, reference: reference_lib.Reference, options: Options
) -> dict[str, Setting]:
    if found.rows is None or reference.rows is None:
        return {}
    rows, real = len(found.rows), len(reference.rows)
    return {
        "precision and recall": (
            f"k = {precision_recall.NUM_NEIGHBOURS}, {rows} samples, {real} real images, distances "
            f"in {options.distances}"
        ),
        "kernel distance": (
            f"degree {kernel_distance.DEGREE}, {options.num_subsets} subsets of "
            f"{min(options.subset_size, rows, real)}"
        ),
    }


def _short(count: int) -> str:
    return f"{count // 1000}k" if count % 1000 == 0 else f"{count}"
