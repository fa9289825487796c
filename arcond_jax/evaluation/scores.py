"""Scores read off a classifier, and how close samples come to the images trained on."""

from collections.abc import Mapping

import numpy as np
import scipy.special
from jaxtyping import Float, Float64, Int

from arcond_jax.evaluation import neighbours

SPLIT_SIZE = 5000  # rows of a chunk of the Inception Score, as in ADM's evaluator


class InceptionScore:
    """The Inception Score of logits that pass by in any order, each row with its number.

    Rows are cut in their order into chunks of `split_size`, the last of which may be short; the
    score is the mean over chunks. Kept are sums, one number a class for each chunk.
    """

    def __init__(self, num_classes: int, *, split_size: int = SPLIT_SIZE) -> None:
        self._num_classes, self._split_size = num_classes, split_size
        # Per chunk: how many rows, the sum of their probabilities, and of their p log p.
        self._chunks: dict[int, tuple[int, Float64[np.ndarray, " classes"], float]] = {}

    def add(self, logits: Float[np.ndarray, "n classes"], first_row: int) -> None:
        """Takes in the rows from number `first_row` on."""
        log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
        p = np.exp(log_p)
        own = np.sum(p * log_p, axis=1)
        place = (first_row + np.arange(len(logits))) // self._split_size
        for chunk in np.unique(place).tolist():
            rows = place == chunk
            self._add(chunk, int(rows.sum()), p[rows].sum(axis=0), float(own[rows].sum()))

    def merge(self, other: "InceptionScore") -> None:
        """Takes in what another one has seen."""
        for chunk, sums in other._chunks.items():
            self._add(chunk, *sums)

    def value(self) -> float:
        """From 1 (every image read alike) to the number of classes (sure and evenly spread)."""
        scores = []
        for _, (count, total, own) in sorted(self._chunks.items()):
            marginal = total / count
            entropy = -np.sum(scipy.special.xlogy(marginal, marginal))
            scores.append(np.exp(own / count + entropy))
        return float(np.mean(scores))

    def arrays(self, num_rows: int) -> dict[str, np.ndarray]:
        """All of it as arrays of one shape for `num_rows` rows, to send to another process."""
        sums = np.zeros((-(-num_rows // self._split_size), self._num_classes + 2))
        for chunk, (count, total, own) in self._chunks.items():
            sums[chunk] = [count, own, *total]
        return {"sums": sums}

    def merge_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes in what `arrays` of another one gave."""
        for chunk, (count, own, *total) in enumerate(arrays["sums"]):
            if count:
                self._add(chunk, int(count), np.asarray(total), float(own))

    def _add(
        self, chunk: int, count: int, total: Float64[np.ndarray, " classes"], own: float
    ) -> None:
        counted, summed, owned = self._chunks.get(chunk, (0, np.zeros(self._num_classes), 0.0))
        self._chunks[chunk] = (counted + count, summed + total, owned + own)


def inception_score(
    logits: Float[np.ndarray, "n classes"], *, split_size: int = SPLIT_SIZE
) -> float:
    """Exponential of the mean KL divergence from the marginal class law to each image's.

    As ADM's evaluator has it: chunks of 5,000 rows in order and the mean over them, without the
    deviation over ten splits of the paper. The classifier is whatever made the logits, not
    necessarily Inception; of Inception the logits are those without their bias.

    Source: Salimans et al. (2016), section 4; guided-diffusion, evaluations/evaluator.py,
    `compute_inception_score`.
    """
    score = InceptionScore(logits.shape[1], split_size=split_size)
    score.add(logits, 0)
    return score.value()


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
