"""The evaluation card: what it measures, what it says, and that it survives JSON."""

import dataclasses
import json

import numpy as np
import pytest

from arcond_jax.evaluation import card as card_lib

SETTINGS = card_lib.Settings(
    guidance_scale=1.5,
    guidance_schedule="linear",
    code_temperature=None,
    latent_temperature=1.05,
    num_ar_steps=None,
    solver="ddim",
    num_head_evaluations=10,
    other_settings={"top_k": 5},
    refinement="transport",
    refinement_settings={"strength": 0.5, "epsilon": 0.1},
    seed=7,
    checkpoint_step=1200,
)


@pytest.fixture(scope="module")
def card(stripes, reference):
    image, label = stripes
    return card_lib.evaluate(image[180:], label[180:], reference=reference, settings=SETTINGS)


def test_real_images_score_as_real(card):
    assert card.class_accuracy == 1.0
    assert card.precision > 0.8
    assert card.recall > 0.8
    assert 2.9 < card.inception_score <= 3.0
    assert card.nearest_neighbour_ratio == pytest.approx(1.0, abs=0.1)
    assert 0.0 < card.frechet_distance < 10 * card.frechet_distance_real
    assert (card.num_samples, card.num_reference, card.num_train) == (60, 60, 120)
    assert (card.min_per_class, card.max_per_class) == (20, 20)


def test_training_images_are_seen_as_copies(stripes, reference):
    image, label = stripes
    copied = card_lib.evaluate(image[:120], label[:120], reference=reference, settings=SETTINGS)
    assert copied.frechet_distance_train == pytest.approx(0.0, abs=1e-9)
    assert copied.frechet_distance == pytest.approx(copied.frechet_distance_real, rel=1e-9)
    assert copied.nearest_neighbour_ratio == pytest.approx(0.0, abs=1e-5)
    assert copied.num_precision_recall == 60


def test_worse_samples_score_worse(card, stripes, reference):
    image, label = stripes
    noise = np.random.default_rng(0).uniform(-1, 1, image[180:].shape).astype(np.float32)
    noisy = card_lib.evaluate(noise, label[180:], reference=reference, settings=SETTINGS)
    assert noisy.frechet_distance > card.frechet_distance
    assert noisy.frechet_distance_pixels > card.frechet_distance_pixels
    assert noisy.class_accuracy < card.class_accuracy
    assert noisy.nearest_neighbour_ratio > 2.0


def test_json_round_trip(card):
    assert card_lib.from_json(card.as_json()) == card
    assert json.loads(card.as_json())["settings"]["latent_temperature"] == 1.05


def test_json_of_something_else_is_refused(card):
    fields = json.loads(card.as_json())
    del fields["recall"]
    for text in ("{", "[]", "{}", json.dumps(fields)):
        with pytest.raises(ValueError, match="not an evaluation card"):
            card_lib.from_json(text)


def test_text_names_its_terms_and_fits_a_terminal(card):
    text = card.as_text()
    for words in (
        "NOT Inception FID",
        "stripes, held out, 60 images",
        "1.5, linear",
        "codes -, latents 1.05",
        "10 per token",
        "transport, strength 0.5, epsilon 0.1",
        "60, 20 of each class",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 100
    plain = dataclasses.replace(
        card,
        max_per_class=25,
        settings=dataclasses.replace(SETTINGS, refinement=None, refinement_settings={}),
    )
    assert "refinement            none" in plain.as_text()
    assert "20 to 25 of each class" in plain.as_text()


def test_bad_images_are_refused(stripes, reference):
    image, label = stripes
    cases = [
        (image[:60], label[:59], "60 samples came with 59 labels"),
        (image[:60] * 127.5 + 127.5, label[:60], r"outside \[-1, 1\]"),
        (np.full_like(image[:60], np.nan), label[:60], r"span nan to nan"),
    ]
    for bad_image, bad_label, message in cases:
        with pytest.raises(ValueError, match=message):
            card_lib.evaluate(bad_image, bad_label, reference=reference, settings=SETTINGS)
