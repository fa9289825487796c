"""Scores read off a classifier, and how close samples come to the images trained on."""

import numpy as np
import scipy.special
from jaxtyping import Float, Int

from arcond_jax.evaluation import neighbours


def inception_score(logits: Float[np.ndarray, "n classes"]) -> float:
    """Exponential of the mean KL divergence from the marginal class law to each image's.

    All samples form a single split, so there is no deviation over ten splits as in the paper. The
    classifier is whatever made the logits, not necessarily Inception.

    Returns:
      From 1 (every image read alike) to the number of classes (sure and evenly spread).

    Source: Salimans et al. (2016), section 4.
    """
    log_conditional = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    log_marginal = scipy.special.logsumexp(log_conditional, axis=0) - np.log(len(logits))
    divergence = np.sum(np.exp(log_conditional) * (log_conditional - log_marginal), axis=1)
    return float(np.exp(divergence.mean()))


def class_accuracy(logits: Float[np.ndarray, "n classes"], label: Int[np.ndarray, " n"]) -> float:
    """Share of images whose largest logit is that of their label."""
    return float(np.mean(logits.argmax(axis=1) == label))


def nearest_neighbour_ratio(
    image: Float[np.ndarray, "n height width channels"],
    image_train: Float[np.ndarray, "m height width channels"],
    *,
    held_out_distance: float,
) -> float | None:
    """Mean distance to the nearest training image, over that of real held-out images.

    Args:
      image: Samples, in the scale of the training images.
      image_train: Images that the generator was trained on.
      held_out_distance: `mean_nearest_distance` of real images that it was not trained on.

    Returns:
      About 1 for new images of the same law; well below 1 means copies, above 1 means images that
      are far from any real one. None where every held-out image is among the training images.
    """
    if held_out_distance == 0.0:
        return None
    return mean_nearest_distance(image, image_train) / held_out_distance


def mean_nearest_distance(
    image: Float[np.ndarray, "n height width channels"],
    image_train: Float[np.ndarray, "m height width channels"],
) -> float:
    """Mean Euclidean pixel distance from each image to its nearest training image."""
    flat, flat_train = image.reshape(len(image), -1), image_train.reshape(len(image_train), -1)
    return float(neighbours.nearest_distance(flat, flat_train).mean())
