"""One small classifier and its reference, shared by the tests of this folder."""

import numpy as np
import pytest

from arcond_jax.evaluation import card as card_lib
from arcond_jax.evaluation import classifier as classifier_lib


@pytest.fixture(scope="session")
def stripes():
    """Three classes of 6x6 images: a bright row at one of three heights, with noise."""
    rng = np.random.default_rng(0)
    label = (np.arange(240) % 3).astype(np.int32)
    image = -0.8 + 0.1 * rng.standard_normal((240, 6, 6, 1))
    image[np.arange(240), 2 * label] += 1.2
    return np.clip(image, -1, 1).astype(np.float32), label


@pytest.fixture(scope="session")
def classifier(stripes):
    image, label = stripes
    return classifier_lib.train_classifier(
        image[:120], label[:120], num_classes=3, seed=0, num_train_steps=150
    )


@pytest.fixture(scope="session")
def reference(stripes, classifier):
    image, label = stripes
    return card_lib.reference(
        image[120:180],
        label[120:180],
        image_train=image[:120],
        extractor=classifier,
        name="stripes, held out",
    )
