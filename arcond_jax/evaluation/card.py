"""The evaluation card: the metrics of a set of samples, with everything they depend on.

Images and labels come in; a card goes out, as JSON or as text for a terminal. What belongs to the
real images is computed once, in `reference`, and serves any number of sample sets.

Images are read in batches and never held whole. Pixels are compared on images averaged to at most
`features.SMALL` (32) pixels a side, and get a Frechet distance of their own only up to
`MAX_PIXELS` numbers an image: its covariance is that number squared.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from arcond_jax.evaluation import features as features_lib
from arcond_jax.evaluation import frechet, moments, precision_recall, scores

SUBSET_SEED = 0  # the same rows for every sampler, so that comparisons stay paired
NUM_NEIGHBOURS = precision_recall.NUM_NEIGHBOURS
MAX_PIXELS = 1024  # 32x32 in grey; a second of linear algebra, where 32x32x3 takes half a minute

Setting = float | int | str | bool | None

# Of files of earlier versions: what is no setting of the sampler.
APART = ("other_settings", "refinement", "refinement_settings", "seed", "checkpoint_step")

# What is measured, in words, and what a reader should know of it.
MEASUREMENTS = {
    "frechet_distance": ("Frechet distance", "of features, to the reference; lower is better"),
    "frechet_distance_real": ("  of real images", "that of the training images: as good as real"),
    "frechet_distance_train": ("  to training images", ""),
    "frechet_distance_pixels": ("  of raw pixels", "in [-1, 1], to the reference"),
    "precision": ("precision", "share of samples inside the reference manifold"),
    "recall": ("recall", "share of reference images inside the samples' manifold"),
    "class_accuracy": ("class accuracy", "share of samples read as their label"),
    "inception_score": ("inception score", "of these logits, 5,000 images a split"),
    "nearest_neighbour_ratio": (
        "nearest neighbour",
        "times the distance of real held-out images; < 1 copies",
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How samples were made; only what was applied.

    Attributes:
      sampling: Of the sampler, by name.
      refinement: Of the refinement of conditions, its kind among them; empty without one.
      seed: Of sampling.
      checkpoint_step: Training step of the weights.
    """

    sampling: Mapping[str, Setting]
    refinement: Mapping[str, Setting]
    seed: int
    checkpoint_step: int


def settings_of(metadata: Mapping[str, Any]) -> Settings:
    """How samples were made, as their file says; files of earlier versions say it flat.

    Raises:
      ValueError: It does not.
    """
    try:
        seed, step = metadata["seed"], metadata["checkpoint_step"]
        if "sampling" in metadata:
            sampling, refinement = metadata["sampling"], metadata["refinement"]
        else:
            flat = {**metadata, **metadata["other_settings"]}
            sampling = {k: x for k, x in flat.items() if k not in APART and x is not None}
            refinement = metadata["refinement_settings"]
    except (KeyError, TypeError):
        raise ValueError("the samples do not say how they were made") from None
    for name, value in {"seed": seed, "checkpoint_step": step}.items():
        if type(value) is not int:
            raise ValueError(f"the samples' {name} is {value!r:.80}, no whole number")
    return Settings(_plain(sampling, "sampling"), _plain(refinement, "refinement"), seed, step)


def _plain(settings: Any, name: str) -> dict[str, Setting]:
    if not isinstance(settings, dict):
        raise ValueError(f"the samples' {name} is {settings!r:.80}, not settings by name")
    for key, value in settings.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        if not (value is None or isinstance(value, int | str | float)) or not finite:
            raise ValueError(f"the samples' setting {key!r:.80} is {value!r:.80}, no plain value")
    return settings


@dataclasses.dataclass(frozen=True)
class EvaluationCard:
    """Metrics of one set of samples and what they were measured with.

    Attributes:
      settings: How the samples were made.
      measured_with: Images and features behind the measurements, by name, in words or numbers.
      measurements: Named numbers; `MEASUREMENTS` says what they are.
    """

    settings: Settings
    measured_with: Mapping[str, Setting]
    measurements: Mapping[str, float]

    def as_json(self) -> str:
        """The card as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)

    def as_text(self) -> str:
        """The card as aligned lines of at most 100 characters when names are short."""
        settings = self.settings
        sections = {
            "Samples": {
                "checkpoint step": f"{settings.checkpoint_step}",
                "sampling seed": f"{settings.seed}",
                **{name: f"{value}" for name, value in settings.sampling.items()},
                "refinement": _listed(settings.refinement) or "none",
            },
            "Measured with": {name: f"{value}" for name, value in self.measured_with.items()},
            "Metrics": {
                label: f"{self.measurements[name]:8.3f}   {note}".rstrip()
                for name, (label, note) in MEASUREMENTS.items()
                if name in self.measurements
            },
        }
        closing = (
            "This Frechet distance is NOT Inception FID: its features are those named above.",
            "Compare it only with cards of the same features, reference and number of samples.",
        )
        return sections_text(sections, closing)


def sections_text(sections: Mapping[str, Mapping[str, str]], closing: Sequence[str] = ()) -> str:
    """Named texts below titles, aligned, and lines to close with."""
    width = max(len(name) for section in sections.values() for name in section)
    lines = []
    for title, section in sections.items():
        if section:
            lines += [title, *(f"  {name:<{width}}  {text}" for name, text in section.items()), ""]
    return "\n".join([*lines, *closing])


def _listed(settings: Mapping[str, Setting]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


@dataclasses.dataclass(frozen=True)
class Reference:
    """All that real images contribute to the metrics; made by `reference`."""

    name: str
    extractor: features_lib.Features
    extractor_accuracy: float
    features: Float32[np.ndarray, "n features"]
    feature_statistics: moments.Statistics
    feature_statistics_train: moments.Statistics
    pixel_statistics: moments.Statistics | None
    image_shape: tuple[int, ...]
    image_small_train: Float[np.ndarray, "m height width channels"]
    nearest_train_distance: float
    made_by: Mapping[str, Setting]


def reference(
    image: features_lib.Images,
    label: Int[np.ndarray, " labels"],
    *,
    image_train: features_lib.Images,
    extractor: features_lib.Features,
    name: str = "held-out images",
    made_by: Mapping[str, Setting] | None = None,
) -> Reference:
    """Computes what later evaluations reuse.

    Args:
      image: Real images, in [-1, 1], that neither the generator nor the extractor has seen.
        These and the next are arrays or load as they are sliced.
      label: Their classes, to measure the extractor.
      image_train: Images that the generator was trained on, in [-1, 1].
      extractor: Source of the features and of the logits.
      name: Name of the split, printed on the card.
      made_by: How the real images were made, where that is not the usual way.

    Raises:
      ValueError: Images out of range, not as many labels as images, or a label that the extractor
        does not know.
    """
    _check_labels(image, label, extractor.num_classes, what="reference images")
    real = features_lib.read(extractor, image, what="reference images")
    train = features_lib.read(extractor, image_train, what="training images")
    return Reference(
        name=name,
        extractor=extractor,
        extractor_accuracy=scores.class_accuracy(real.logits, label),
        features=real.features,
        feature_statistics=moments.statistics(real.features),
        feature_statistics_train=moments.statistics(train.features),
        pixel_statistics=_pixel_statistics(real),
        image_shape=real.image_shape,
        image_small_train=train.image_small,
        nearest_train_distance=scores.mean_nearest_distance(real.image_small, train.image_small),
        made_by=dict(made_by or {}),
    )


def evaluate(
    image: features_lib.Images,
    label: Int[np.ndarray, " labels"],
    *,
    reference: Reference,
    settings: Settings,
) -> EvaluationCard:
    """Measures one set of samples.

    Precision and recall take equally many rows from both sides, as in the paper: the larger side
    gives a random subset, the same one every time.

    Args:
      image: Samples in [-1, 1], as they would be read back from a file of uint8 images.
      label: Class asked for, for each sample.
      reference: Real images, prepared once by the function of that name.
      settings: How the samples were made, copied onto the card.

    Raises:
      ValueError: Images out of range or of another shape than the reference, not as many labels as
        images, a label that the extractor does not know, or too few images for a covariance or for
        neighbours.
    """
    _check_labels(image, label, reference.extractor.num_classes, what="samples")
    check_shape(image[:1].shape[1:], reference.image_shape)
    drawn = features_lib.read(reference.extractor, image, what="samples")
    statistics = moments.statistics(drawn.features)
    num_rows = min(len(drawn.features), len(reference.features))
    precision, recall = precision_recall.precision_recall(
        _subset(drawn.features, num_rows),
        _subset(reference.features, num_rows),
        num_neighbours=NUM_NEIGHBOURS,
    )

    distance = frechet.frechet_distance
    real, train = reference.feature_statistics, reference.feature_statistics_train
    pixels, pixels_real = _pixel_statistics(drawn), reference.pixel_statistics
    measurements = {
        "frechet_distance": distance(statistics, real),
        "frechet_distance_real": distance(train, real),
        "frechet_distance_train": distance(statistics, train),
        "frechet_distance_pixels": pixels and pixels_real and distance(pixels, pixels_real),
        "precision": precision,
        "recall": recall,
        "class_accuracy": scores.class_accuracy(drawn.logits, label),
        "inception_score": scores.inception_score(drawn.logits),
        "nearest_neighbour_ratio": scores.nearest_neighbour_ratio(
            drawn.image_small,
            reference.image_small_train,
            held_out_distance=reference.nearest_train_distance,
        ),
    }
    return EvaluationCard(
        settings=settings,
        measured_with=_measured_with(label, num_rows, reference),
        measurements={name: x for name, x in measurements.items() if x is not None},
    )


def check_shape(image_shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises ValueError if samples are of another height, width or channels than real images."""
    if tuple(image_shape) != tuple(expected):
        raise ValueError(
            f"The samples are {list(image_shape)}, the real images {list(expected)}: they cannot "
            "be compared."
        )


def _measured_with(
    label: Int[np.ndarray, " labels"],
    num_rows: int,
    reference: Reference,
) -> dict[str, Setting]:
    per_class = np.bincount(label, minlength=reference.extractor.num_classes)
    each = f"{per_class.min()}"
    if per_class.max() != per_class.min():
        each = f"{per_class.min()} to {per_class.max()}"
    accuracy = reference.extractor_accuracy
    small = reference.image_small_train.shape[1:3]
    reduced = {}
    if small != reference.image_shape[:2]:
        reduced = {"nearest neighbour": f"of images averaged to {small[0]}x{small[1]} pixels"}
    return {
        "samples": f"{len(label)}, {each} of each class",
        "reference": f"{reference.name}, {len(reference.features)} images",
        "training images": len(reference.image_small_train),
        **reference.made_by,
        "features": f"{reference.features.shape[1]} of {reference.extractor.description}",
        "its accuracy": f"{accuracy:.1%} on the reference images",
        "precision and recall": f"k = {NUM_NEIGHBOURS}, {num_rows} images a side",
        **reduced,
    }


def _check_labels(
    image: features_lib.Images, label: Int[np.ndarray, " labels"], num_classes: int, *, what: str
) -> None:
    if len(image) != len(label):
        raise ValueError(f"{len(image)} {what} came with {len(label)} labels.")
    if len(label) and not (label.min() >= 0 and label.max() < num_classes):
        raise ValueError(
            f"The labels of the {what} span {label.min()} to {label.max()}, outside the "
            f"{num_classes} classes of the features."
        )


def _pixel_statistics(reading: features_lib.Reading) -> moments.Statistics | None:
    """Of raw pixels, or None where they are too many for a covariance."""
    if math.prod(reading.image_shape) > MAX_PIXELS:
        return None
    return moments.statistics(reading.image_small.reshape(len(reading.image_small), -1))


def _subset(features: Float[np.ndarray, "n d"], num_rows: int) -> Float[np.ndarray, "rows d"]:
    if len(features) == num_rows:
        return features
    return features[np.random.default_rng(SUBSET_SEED).permutation(len(features))[:num_rows]]
