"""The evaluation card: the metrics of a set of samples, with everything they depend on.

Images and labels come in; a card goes out, as JSON or as text for a terminal. What belongs to the
real images is computed once, in `reference`, and serves any number of sample sets.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int

from arcond_jax.evaluation import features as features_lib
from arcond_jax.evaluation import frechet, precision_recall, scores

SUBSET_SEED = 0  # the same rows for every sampler, so that comparisons stay paired
NUM_NEIGHBOURS = 3  # Kynkaanniemi et al. (2019)

Setting = float | int | str | bool | None

# What is measured, in words, and what a reader should know of it.
MEASUREMENTS = {
    "frechet_distance": ("Frechet distance", "of features, to the reference; lower is better"),
    "frechet_distance_real": ("  of real images", "that of the training images: as good as real"),
    "frechet_distance_train": ("  to training images", ""),
    "frechet_distance_pixels": ("  of raw pixels", "in [-1, 1], to the reference"),
    "precision": ("precision", "share of samples inside the reference manifold"),
    "recall": ("recall", "share of reference images inside the samples' manifold"),
    "class_accuracy": ("class accuracy", "share of samples read as their label"),
    "inception_score": ("inception score", "of these logits, one split"),
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
            return Settings(metadata["sampling"], metadata["refinement"], seed, step)
        sampling = {**metadata, **metadata["other_settings"]}
        apart = ("other_settings", "refinement", "refinement_settings", "seed", "checkpoint_step")
        sampling = {k: x for k, x in sampling.items() if k not in apart and x is not None}
        return Settings(sampling, metadata["refinement_settings"], seed, step)
    except (KeyError, TypeError):
        raise ValueError("the samples do not say how they were made") from None


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
        width = max(len(name) for section in sections.values() for name in section)
        lines = []
        for title, section in sections.items():
            lines += [title, *(f"  {name:<{width}}  {text}" for name, text in section.items()), ""]
        lines += [
            "This Frechet distance is NOT Inception FID: its features are those named above.",
            "Compare it only with cards of the same features, reference and number of samples.",
        ]
        return "\n".join(lines)


def _listed(settings: Mapping[str, Setting]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


@dataclasses.dataclass(frozen=True)
class Reference:
    """All that real images contribute to the metrics; made by `reference`."""

    name: str
    extractor: features_lib.Features
    extractor_accuracy: float
    features: Float32[np.ndarray, "n features"]
    feature_statistics: frechet.Statistics
    feature_statistics_train: frechet.Statistics
    pixel_statistics: frechet.Statistics
    image_train: Float32[np.ndarray, "m height width channels"]
    nearest_train_distance: float


def reference(
    image: Float32[np.ndarray, "n height width channels"],
    label: Int[np.ndarray, " labels"],
    *,
    image_train: Float32[np.ndarray, "m height width channels"],
    extractor: features_lib.Features,
    name: str = "held-out images",
) -> Reference:
    """Computes what later evaluations reuse.

    Args:
      image: Real images, in [-1, 1], that neither the generator nor the extractor has seen.
      label: Their classes, to measure the extractor.
      image_train: Images that the generator was trained on, in [-1, 1].
      extractor: Source of the features and of the logits.
      name: Name of the split, printed on the card.

    Raises:
      ValueError: Images out of range, or not as many labels as images.
    """
    _check_images(image, label, what="reference images")
    features, logits = map(np.asarray, extractor(image))
    features_train = np.asarray(extractor(image_train)[0])
    return Reference(
        name=name,
        extractor=extractor,
        extractor_accuracy=scores.class_accuracy(logits, label),
        features=features,
        feature_statistics=frechet.statistics(features),
        feature_statistics_train=frechet.statistics(features_train),
        pixel_statistics=frechet.statistics(_flat(image)),
        image_train=image_train,
        nearest_train_distance=scores.mean_nearest_distance(image, image_train),
    )


def evaluate(
    image: Float32[np.ndarray, "n height width channels"],
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
        images, or too few images for a covariance or for neighbours.
    """
    _check_images(image, label, what="samples")
    features, logits = map(np.asarray, reference.extractor(image))
    statistics = frechet.statistics(features)
    num_rows = min(len(features), len(reference.features))
    precision, recall = precision_recall.precision_recall(
        _subset(features, num_rows),
        _subset(reference.features, num_rows),
        num_neighbours=NUM_NEIGHBOURS,
    )

    distance = frechet.frechet_distance
    real, train = reference.feature_statistics, reference.feature_statistics_train
    pixels = frechet.statistics(_flat(image))
    return EvaluationCard(
        settings=settings,
        measured_with=_measured_with(label, features, num_rows, reference),
        measurements={
            "frechet_distance": distance(statistics, real),
            "frechet_distance_real": distance(train, real),
            "frechet_distance_train": distance(statistics, train),
            "frechet_distance_pixels": distance(pixels, reference.pixel_statistics),
            "precision": precision,
            "recall": recall,
            "class_accuracy": scores.class_accuracy(logits, label),
            "inception_score": scores.inception_score(logits),
            "nearest_neighbour_ratio": scores.nearest_neighbour_ratio(
                image, reference.image_train, held_out_distance=reference.nearest_train_distance
            ),
        },
    )


def _measured_with(
    label: Int[np.ndarray, " labels"],
    features: Float[np.ndarray, "n d"],
    num_rows: int,
    reference: Reference,
) -> dict[str, Setting]:
    per_class = np.bincount(label, minlength=reference.extractor.num_classes)
    each = f"{per_class.min()}"
    if per_class.max() != per_class.min():
        each = f"{per_class.min()} to {per_class.max()}"
    accuracy = reference.extractor_accuracy
    return {
        "samples": f"{len(label)}, {each} of each class",
        "reference": f"{reference.name}, {len(reference.features)} images",
        "training images": len(reference.image_train),
        "features": f"{features.shape[1]} of {reference.extractor.description}",
        "its accuracy": f"{accuracy:.1%} on the reference images",
        "precision and recall": f"k = {NUM_NEIGHBOURS}, {num_rows} images a side",
    }


def _check_images(
    image: Float[np.ndarray, "n height width channels"],
    label: Int[np.ndarray, " labels"],
    *,
    what: str,
) -> None:
    if len(image) != len(label):
        raise ValueError(f"{len(image)} {what} came with {len(label)} labels.")
    low, high = image.min(), image.max()
    if not (low >= -1.0 and high <= 1.0):  # not (...) so that NaN fails too
        raise ValueError(
            f"The {what} span {low:g} to {high:g}, outside [-1, 1]: convert or clip them first."
        )


def _flat(
    image: Float[np.ndarray, "n height width channels"],
) -> Float[np.ndarray, "n pixels"]:
    return image.reshape(len(image), -1)


def _subset(features: Float[np.ndarray, "n d"], num_rows: int) -> Float[np.ndarray, "rows d"]:
    if len(features) == num_rows:
        return features
    return features[np.random.default_rng(SUBSET_SEED).permutation(len(features))[:num_rows]]
