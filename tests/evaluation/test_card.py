"""The evaluation card: what it measures, what it says, and that it survives JSON."""

import dataclasses
import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from arcond_jax.evaluation import card as card_lib
from arcond_jax.evaluation import features, neighbours

SETTINGS = card_lib.Settings(
    sampling={
        "guidance_scale": 1.5,
        "guidance_schedule": "linear",
        "latent_temperature": 1.05,
        "solver": "ddim",
        "num_head_evaluations": 10,
        "top_k": 5,
    },
    refinement={"kind": "stored", "tau": 0.5, "epsilon": 0.1},
    seed=7,
    checkpoint_step=1200,
)


@pytest.fixture(scope="module")
def card(stripes, reference):
    image, label = stripes
    return card_lib.evaluate(image[180:], label[180:], reference=reference, settings=SETTINGS)


def test_real_images_score_as_real(card):
    found = card.measurements
    assert found.keys() == card_lib.MEASUREMENTS.keys()
    assert found["class_accuracy"] == 1.0
    assert found["precision"] > 0.8
    assert found["recall"] > 0.8
    assert 2.9 < found["inception_score"] <= 3.0
    assert found["nearest_neighbour_ratio"] == pytest.approx(1.0, abs=0.1)
    assert 0.0 < found["frechet_distance"] < 10 * found["frechet_distance_real"]
    assert card.measured_with["samples"] == "60, 20 of each class"
    assert card.measured_with["reference"] == "stripes, held out, 60 images"
    assert card.measured_with["training images"] == 120


def test_training_images_are_seen_as_copies(stripes, reference):
    image, label = stripes
    copied = card_lib.evaluate(image[:120], label[:120], reference=reference, settings=SETTINGS)
    found = copied.measurements
    assert found["frechet_distance_train"] == pytest.approx(0.0, abs=1e-9)
    assert found["frechet_distance"] == pytest.approx(found["frechet_distance_real"], rel=1e-9)
    assert found["nearest_neighbour_ratio"] == pytest.approx(0.0, abs=1e-5)
    assert copied.measured_with["samples"] == "120, 40 of each class"
    assert copied.measured_with["precision and recall"] == "k = 3, 60 images a side"


def test_worse_samples_score_worse(card, stripes, reference):
    image, label = stripes
    noise = np.random.default_rng(0).uniform(-1, 1, image[180:].shape).astype(np.float32)
    noisy = card_lib.evaluate(noise, label[180:], reference=reference, settings=SETTINGS)
    found, real = noisy.measurements, card.measurements
    assert found["frechet_distance"] > real["frechet_distance"]
    assert found["frechet_distance_pixels"] > real["frechet_distance_pixels"]
    assert found["class_accuracy"] < real["class_accuracy"]
    assert found["nearest_neighbour_ratio"] > 2.0


def test_json_holds_all_of_the_card(card):
    fields = json.loads(card.as_json())
    assert fields == dataclasses.asdict(card)
    assert fields["settings"]["sampling"]["latent_temperature"] == 1.05


def test_files_of_samples_say_how_they_were_made():
    metadata = json.loads(json.dumps(dataclasses.asdict(SETTINGS)))
    assert card_lib.settings_of(metadata) == SETTINGS


def test_files_of_earlier_versions_say_it_too():
    metadata = dict(
        guidance_scale=1.5,
        guidance_schedule="linear",
        code_temperature=None,
        latent_temperature=1.05,
        num_ar_steps=None,
        solver="ddim",
        num_head_evaluations=10,
        other_settings={"top_k": 5},
        refinement="stored",
        refinement_settings={"kind": "stored", "tau": 0.5, "epsilon": 0.1},
        seed=7,
        checkpoint_step=1200,
    )
    assert card_lib.settings_of(metadata) == SETTINGS
    plain = metadata | {"refinement": None, "refinement_settings": {}}
    assert card_lib.settings_of(plain) == dataclasses.replace(SETTINGS, refinement={})


@pytest.mark.parametrize("lost", ["seed", "sampling", "refinement"])
def test_files_that_do_not_say_it_are_refused(lost):
    metadata = dataclasses.asdict(SETTINGS)
    del metadata[lost]
    with pytest.raises(ValueError, match="the samples do not say how they were made"):
        card_lib.settings_of(metadata)


def test_text_names_its_terms_and_fits_a_terminal(card):
    text = card.as_text()
    for words in (
        "NOT Inception FID",
        "stripes, held out, 60 images",
        "kind stored, tau 0.5, epsilon 0.1",
        "60, 20 of each class",
        "32 of a small classifier trained on the training images",
    ):
        assert words in text
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert lines > {
        "checkpoint step 1200",
        "sampling seed 7",
        *(f"{name} {value}" for name, value in SETTINGS.sampling.items()),
    }
    assert max(map(len, text.splitlines())) <= 100
    plain = dataclasses.replace(card, settings=dataclasses.replace(SETTINGS, refinement={}))
    assert "refinement            none" in plain.as_text()


def test_classes_of_unequal_size_are_told(stripes, reference):
    image, label = stripes
    uneven = card_lib.evaluate(image[181:], label[181:], reference=reference, settings=SETTINGS)
    assert uneven.measured_with["samples"] == "59, 19 to 20 of each class"


class Brightness:
    """Features and logits without anything trained: the mean of each row, and of three of them."""

    description, num_classes = "the rows", 3

    def __call__(self, image):
        rows = jnp.asarray(image).mean(axis=(2, 3))
        return features.Outputs(rows, 9.0 * rows[:, ::2])


def test_any_features_will_do(stripes):
    image, label = stripes
    reference = card_lib.reference(
        image[120:180], label[120:180], image_train=image[:120], extractor=Brightness()
    )
    found = card_lib.evaluate(image[180:], label[180:], reference=reference, settings=SETTINGS)
    assert found.measured_with["features"] == "6 of the rows"
    assert found.measured_with["its accuracy"] == "100.0% on the reference images"
    assert found.measurements["class_accuracy"] == 1.0


def test_bad_images_are_refused(stripes, reference):
    image, label = stripes
    cases = [
        (image[:60, :5], label[:60], r"samples are \[5, 6, 1\], the real images \[6, 6, 1\]"),
        (image[:60], label[:60] + 1, "labels of the samples span 1 to 3, outside the 3 classes"),
        (image[:0], label[:0], "no samples to evaluate"),
        (image[:60], label[:59], "60 samples came with 59 labels"),
        (image[:60] * 127.5 + 127.5, label[:60], r"outside \[-1, 1\]"),
        (np.full_like(image[:60], np.nan), label[:60], r"span nan to nan"),
    ]
    for bad_image, bad_label, message in cases:
        with pytest.raises(ValueError, match=message):
            card_lib.evaluate(bad_image, bad_label, reference=reference, settings=SETTINGS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(seed="7"), "samples' seed is '7', no whole number"),
        (dict(checkpoint_step=None), "samples' checkpoint_step is None"),
        (dict(sampling=[]), r"samples' sampling is \[\], not settings by name"),
        (dict(sampling={"top_k": []}), r"setting 'top_k' is \[\], no plain value"),
        (dict(refinement={"tau": float("nan")}), "setting 'tau' is nan, no plain value"),
    ],
)
def test_settings_of_a_wrong_type_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        card_lib.settings_of(dataclasses.asdict(SETTINGS) | settings)


class Read:
    """Images that are made as they are sliced, and remember how many at a time."""

    def __init__(self, image):
        self.image, self.most = image, 0

    def __len__(self):
        return len(self.image)

    def __getitem__(self, rows):
        self.most = max(self.most, len(self.image[rows]))
        return self.image[rows]


def test_images_are_read_in_batches_and_score_the_same(stripes, reference, card, monkeypatch):
    image, label = stripes
    monkeypatch.setattr(features, "BATCH_SIZE", 16)
    monkeypatch.setattr(neighbours, "REFERENCE_ROWS", 50)
    held_out, train, drawn = Read(image[120:180]), Read(image[:120]), Read(image[180:])
    again = card_lib.reference(
        held_out,
        label[120:180],
        image_train=train,
        extractor=reference.extractor,
        name="stripes, held out",
        made_by={"resize": "fast"},
    )
    found = card_lib.evaluate(drawn, label[180:], reference=again, settings=SETTINGS)
    assert found.measured_with == card.measured_with | {"resize": "fast"}
    for name, value in found.measurements.items():
        assert value == pytest.approx(card.measurements[name], rel=1e-4)
    assert held_out.most == train.most == drawn.most == 16


def test_photographs_have_no_covariance_of_pixels():
    """Their nearest neighbours are those of small versions, and the card says so."""
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (24, 96, 96, 3)).astype(np.float32)
    label = np.arange(24) % 3
    tracemalloc.start()
    real = card_lib.reference(image[:8], label[:8], image_train=image[8:16], extractor=Brightness())
    found = card_lib.evaluate(image[16:], label[16:], reference=real, settings=SETTINGS)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20  # the covariance would take 6 GB
    tracemalloc.stop()
    assert "frechet_distance_pixels" not in found.measurements
    assert real.image_small_train.shape == (8, 32, 32, 3)
    reduced = found.measured_with["nearest neighbour"]
    assert reduced == "of images averaged to 32x32 pixels"
    assert found.measurements["nearest_neighbour_ratio"] == pytest.approx(1.0, abs=0.2)
    found.as_text()


def test_held_out_copies_of_training_images_leave_the_ratio_out(stripes):
    image, label = stripes
    real = card_lib.reference(
        image[:60], label[:60], image_train=image[:120], extractor=Brightness()
    )
    found = card_lib.evaluate(image[180:], label[180:], reference=real, settings=SETTINGS)
    assert "nearest_neighbour_ratio" not in found.measurements
    found.as_json()
