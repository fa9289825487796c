"""The evaluation card: the metrics of a set of samples, with everything they depend on.

Images and labels come in; a card goes out, as JSON or as text for a terminal. What belongs to the
real images is computed once, in `reference`, and serves any number of sample sets.
"""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Float32, Int

from arcond_jax.evaluation import classifier as classifier_lib
from arcond_jax.evaluation import frechet, precision_recall, scores

SUBSET_SEED = 0  # the same rows for every sampler, so that comparisons stay paired
NUM_NEIGHBOURS = 3  # Kynkaanniemi et al. (2019)

Setting = float | int | str | bool | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the samples were made; None means that the sampler has no such part.

    Attributes:
      guidance_scale: Classifier-free guidance, 1.0 is none.
      guidance_schedule: How the scale changes over positions, such as "constant" or "linear".
      code_temperature: Divides the logits of the code head.
      latent_temperature: Scales the noise of the diffusion head.
      num_ar_steps: Decoding steps of a masked model.
      solver: Chain of the diffusion head.
      num_head_evaluations: Evaluations of the diffusion head per token, 0 without one.
      other_settings: What else was set of the sampler, such as cuts of the law of codes, by name.
      refinement: Name of the condition refinement.
      refinement_settings: Its settings, by name.
      seed: Sampling seed.
      checkpoint_step: Training step of the weights.
    """

    guidance_scale: float
    guidance_schedule: str
    code_temperature: float | None
    latent_temperature: float | None
    num_ar_steps: int | None
    solver: str | None
    num_head_evaluations: int
    other_settings: Mapping[str, Setting]
    refinement: str | None
    refinement_settings: Mapping[str, Setting]
    seed: int
    checkpoint_step: int


@dataclasses.dataclass(frozen=True)
class EvaluationCard:
    """Metrics of one set of samples and what they were measured with.

    Attributes:
      settings: How the samples were made.
      num_samples: Images measured; Frechet distances fall as it grows.
      min_per_class: Samples of the rarest class.
      max_per_class: Samples of the most frequent class.
      reference_name: Split of real images compared with, such as "digits, held out".
      num_reference: Images in that split.
      num_train: Training images, behind `frechet_distance_train` and `nearest_neighbour_ratio`.
      feature_extractor: Network whose features are compared, in words.
      feature_size: Length of its feature vector.
      feature_extractor_accuracy: Its accuracy on the reference images, in [0, 1].
      num_precision_recall: Rows of each side behind precision and recall.
      frechet_distance: Of features, against the reference; lower is better.
      frechet_distance_train: Of features, against the training images.
      frechet_distance_pixels: Of raw pixels in [-1, 1], against the reference.
      frechet_distance_real: `frechet_distance` of the training images themselves: the level at
        which samples cannot be told from real images.
      precision: Share of samples inside the reference manifold.
      recall: Share of reference images inside the samples' manifold.
      class_accuracy: Share of samples that the extractor reads as their label.
      inception_score: From the extractor's logits, a single split.
      nearest_neighbour_ratio: Pixel distance to the nearest training image over that of the
        reference images; below 1 means copying.
    """

    settings: Settings
    num_samples: int
    min_per_class: int
    max_per_class: int
    reference_name: str
    num_reference: int
    num_train: int
    feature_extractor: str
    feature_size: int
    feature_extractor_accuracy: float
    num_precision_recall: int
    frechet_distance: float
    frechet_distance_train: float
    frechet_distance_pixels: float
    frechet_distance_real: float
    precision: float
    recall: float
    class_accuracy: float
    inception_score: float
    nearest_neighbour_ratio: float

    def as_json(self) -> str:
        """The card as indented JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)

    def as_text(self) -> str:
        """The card as aligned lines of at most 100 characters when names are short."""
        settings = self.settings
        refinement = "none"
        if settings.refinement is not None:
            refinement = f"{settings.refinement}, {_listed(settings.refinement_settings)}"
        per_class = f"{self.min_per_class}"
        if self.max_per_class != self.min_per_class:
            per_class = f"{self.min_per_class} to {self.max_per_class}"
        sections = {
            "Samples": {
                "images": f"{self.num_samples}, {per_class} of each class",
                "checkpoint step": f"{settings.checkpoint_step}",
                "sampling seed": f"{settings.seed}",
                "guidance": f"{settings.guidance_scale:g}, {settings.guidance_schedule}",
                "temperature": f"codes {_or_dash(settings.code_temperature)}, "
                f"latents {_or_dash(settings.latent_temperature)}",
                "decoding steps": _or_dash(settings.num_ar_steps),
                "head evaluations": f"{settings.num_head_evaluations} per token, "
                f"{_or_dash(settings.solver)}",
                "other settings": _listed(settings.other_settings) or "none",
                "refinement": refinement,
            },
            "Measured with": {
                "reference": f"{self.reference_name}, {self.num_reference} images",
                "training images": f"{self.num_train}",
                "features": f"{self.feature_size} of {self.feature_extractor}",
                "its accuracy": f"{self.feature_extractor_accuracy:.1%} on the reference images",
            },
            "Metrics": {
                "Frechet distance": f"{self.frechet_distance:8.3f}   "
                f"(real training images: {self.frechet_distance_real:.3f})",
                "  to training images": f"{self.frechet_distance_train:8.3f}",
                "  of raw pixels": f"{self.frechet_distance_pixels:8.3f}",
                "precision": f"{self.precision:8.3f}   "
                f"(k = {NUM_NEIGHBOURS}, {self.num_precision_recall} images a side)",
                "recall": f"{self.recall:8.3f}",
                "class accuracy": f"{self.class_accuracy:8.3f}",
                "inception score": f"{self.inception_score:8.3f}   (these logits, one split)",
                "nearest neighbour": f"{self.nearest_neighbour_ratio:8.3f}   "
                "(times the distance of real held-out images; < 1 copies)",
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


def from_json(text: str) -> EvaluationCard:
    """Reads a card; raises ValueError when the text is not one."""
    try:
        fields = json.loads(text)
        return EvaluationCard(**(fields | {"settings": Settings(**fields["settings"])}))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"This JSON is not an evaluation card: {error}.") from None


@dataclasses.dataclass(frozen=True)
class Reference:
    """All that real images contribute to the metrics; made by `reference`."""

    name: str
    classifier: classifier_lib.Classifier
    feature_extractor: str
    feature_extractor_accuracy: float
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
    classifier: classifier_lib.Classifier,
    name: str = "held-out images",
    feature_extractor: str = "a small classifier of the training images",
) -> Reference:
    """Computes what later evaluations reuse.

    Args:
      image: Real images, in [-1, 1], that neither the generator nor the classifier has seen.
      label: Their classes, to measure the classifier.
      image_train: Images that the generator was trained on, in [-1, 1].
      classifier: Source of the features and of the logits.
      name: Name of the split, printed on the card.
      feature_extractor: The classifier in words, printed on the card.

    Raises:
      ValueError: Images out of range, or not as many labels as images.
    """
    _check_images(image, label, what="reference images")
    features, logits = map(np.asarray, classifier.features_and_logits(image))
    features_train = np.asarray(classifier.features(image_train))
    return Reference(
        name=name,
        classifier=classifier,
        feature_extractor=feature_extractor,
        feature_extractor_accuracy=scores.class_accuracy(logits, label),
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
    features, logits = map(np.asarray, reference.classifier.features_and_logits(image))
    statistics = frechet.statistics(features)
    num_rows = min(len(features), len(reference.features))
    precision, recall = precision_recall.precision_recall(
        _subset(features, num_rows),
        _subset(reference.features, num_rows),
        num_neighbours=NUM_NEIGHBOURS,
    )
    per_class = np.bincount(label, minlength=reference.classifier.num_classes)
    return EvaluationCard(
        settings=settings,
        num_samples=len(image),
        min_per_class=int(per_class.min()),
        max_per_class=int(per_class.max()),
        reference_name=reference.name,
        num_reference=len(reference.features),
        num_train=len(reference.image_train),
        feature_extractor=reference.feature_extractor,
        feature_size=features.shape[1],
        feature_extractor_accuracy=reference.feature_extractor_accuracy,
        num_precision_recall=num_rows,
        frechet_distance=frechet.frechet_distance(statistics, reference.feature_statistics),
        frechet_distance_train=frechet.frechet_distance(
            statistics, reference.feature_statistics_train
        ),
        frechet_distance_pixels=frechet.frechet_distance(
            frechet.statistics(_flat(image)), reference.pixel_statistics
        ),
        frechet_distance_real=frechet.frechet_distance(
            reference.feature_statistics_train, reference.feature_statistics
        ),
        precision=precision,
        recall=recall,
        class_accuracy=scores.class_accuracy(logits, label),
        inception_score=scores.inception_score(logits),
        nearest_neighbour_ratio=scores.nearest_neighbour_ratio(
            image, reference.image_train, held_out_distance=reference.nearest_train_distance
        ),
    )


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


def _or_dash(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    return "-" if value is None else f"{value:g}"
