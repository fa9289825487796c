"""Scores of a set of images against a reference, with a card that says what each number is.

    inception = inception_lib.load("weights/inception")
    real = reference.read("VIRTUAL_imagenet256_labeled.npz", inception)
    card = scoring.score(image_sets.Npz("samples.npz"), inception, real)
    print(card.as_text())

"FID" is a name for one number alone: of 50,000 images, by the published weights of Inception. Of
fewer images it is FID-10k and the like, to a small reference it says so, and of anything else it is
a Frechet distance.
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
SMALL_REFERENCE = 10_000  # images, below which names say how many
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
    measurements, how, notes = _measured(found, reference, options)
    said = images.facts if isinstance(images, image_sets.ImageSet) else {}
    return Card(
        samples={**said, **(samples or {}), **_about(found)},
        measured_with={**reference_lib.network_facts(extractor), **how},
        reference=reference.facts,
        measurements=measurements,
        names=names(extractor, found.count, measurements, reference=reference),
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
    extractor: features_lib.Features,
    count: int,
    measurements: Mapping[str, float],
    *,
    reference: reference_lib.Reference | None = None,
) -> dict[str, str]:
    """What each number of `count` images is called."""
    few = "" if count == OFFICIAL_COUNT else f"-{_short(count)}"
    if isinstance(extractor, inception.Inception) and extractor.published:
        called = _official(extractor, few, _small(reference))
    else:
        why, of = "other features", ""
        if isinstance(extractor, inception.Inception):
            why = f"weights of sha256 {extractor.sha256[:SHOWN]}"
            of = " of these weights"
        called = {
            "frechet_distance": f"Frechet distance (not FID: {why})",
            "spatial_frechet_distance": f"spatial Frechet distance (not sFID: {why})",
            "inception_score": f"inception score of these {'weights' if of else 'logits'}",
            "precision": f"precision{of}",
            "recall": f"recall{of}",
            "kernel_distance": f"kernel distance (not KID: {why})",
        }
    called |= {
        "kernel_distance_deviation": "  deviation between subsets",
        "class_accuracy": "class accuracy",
        "class_frechet_distance": "mean Frechet distance of a class",
    }
    return {name: called[name] for name in measurements}


def _official(extractor: inception.Inception, few: str, small: list[str]) -> dict[str, str]:
    """Names of what the published weights measure."""
    how = [] if extractor.preprocessing == "tf" else [f"{extractor.preprocessing} preprocessing"]
    how += [] if extractor.dtype == "float32" else [extractor.dtype]
    named = {
        "frechet_distance": (f"FID{few}", small),
        "spatial_frechet_distance": (f"sFID{few}", small),
        "inception_score": (f"Inception Score{few}", []),
        "precision": ("precision", small),
        "recall": ("recall", small),
        "kernel_distance": ("KID", []),
    }
    said = {name: ", ".join([*how, *notes]) for name, (_, notes) in named.items()}
    return {name: x + (f" ({said[name]})" if said[name] else "") for name, (x, _) in named.items()}


def _small(reference: reference_lib.Reference | None) -> list[str]:
    """What is to be said of a reference of few images."""
    features = None if reference is None else reference.features
    count = None if features is None else features.count
    return [] if count is None or count >= SMALL_REFERENCE else [f"to {count} images"]


def _measured(
    found: summary.Summary, reference: reference_lib.Reference, options: Options
) -> tuple[dict[str, float], dict[str, Setting], list[str]]:
    """Numbers, how those of neighbours and kernels were measured, and what could not be."""
    values: dict[str, float] = {}
    how: dict[str, Setting] = {}
    notes: list[str] = []
    for name, ours, theirs in (
        ("frechet_distance", found.features, reference.features),
        ("spatial_frechet_distance", found.spatial, reference.spatial),
    ):
        lacks = [one.lack for one in (ours, theirs) if one is not None]
        few = None if options.singular else next(filter(None, lacks), None)
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
        how = {
            "precision and recall": (
                f"k = {least}, {len(found.rows)} samples, {len(reference.rows)} real images, "
                f"distances in {options.distances}"
            ),
            "kernel distance": (
                f"degree {kernel_distance.DEGREE}, {kernel.num_subsets} subsets of "
                f"{kernel.subset_size}"
            ),
        }
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
    return values, how, notes


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


def _about(found: summary.Summary) -> dict[str, Setting]:
    facts: dict[str, Setting] = {
        "images": found.count,
        "image size": "x".join(map(str, found.image_shape)),
    }
    if found.per_class is not None:
        low, high = found.per_class
        facts["of each class"] = f"{low}" if low == high else f"{low} to {high}"
    return facts


def _short(count: int) -> str:
    return f"{count // 1000}k" if count % 1000 == 0 else f"{count}"
