"""Class names: ids that everybody knows, every class within reach, and what other names cost."""

import contextlib

import pytest

from arcond_jax.data import class_names

NAMES = class_names.imagenet()


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("tench", 0),
        ("Tinca tinca", 0),
        ("Golden Retriever", 207),
        ("  persian_cat ", 283),
        ("minivan", 656),
        ("space shuttle", 812),
        ("volcano", 980),
        ("toilet tissue", 999),
        ("toilet paper", 999),
    ],
)
def test_names_have_their_ids(name, label):
    assert class_names.label_of(name, NAMES) == label


def test_every_class_can_be_asked_for():
    assert len(NAMES) == class_names.NUM_CLASSES
    for label, line in enumerate(NAMES):
        found = []
        for name in line.split(", "):
            with contextlib.suppress(ValueError):
                found.append(class_names.label_of(name, NAMES))
        assert label in found


def test_a_first_name_goes_before_synonyms():
    assert "harp" in NAMES[593].split(", ")
    assert class_names.label_of("harp", NAMES) == 594


def test_a_thousand_classes_of_one_s_own_keep_their_names():
    own = tuple(f"product_{i:04}" for i in range(class_names.NUM_CLASSES))
    assert class_names.spoken(own) == own
    assert class_names.spoken([f"n{i:08}" for i in range(class_names.NUM_CLASSES)]) == NAMES


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "crane",
            r"134 \(crane, crane bird\); 517 \(crane, construction crane\); give one by --label$",
        ),
        (
            "Maillot",
            r"^class name 'Maillot' is ambiguous: 638 \(.*\); 639 \(.*\); give one by --label$",
        ),
        ("panther", r"286 \(cougar, .*\); 290 \(jaguar, .*\); give one by --label$"),
        ("golden retreiver", r"named 'golden retreiver', the closest are golden retriever \(207\)"),
        ("xqzw", r"^none of the 1000 classes is named 'xqzw', none is close: .* by --label$"),
        ("", r"^none of the 1000 classes is named '', none is close: .* by --label$"),
    ],
)
def test_other_names_cost_one_line(name, message):
    with pytest.raises(ValueError, match=message) as error:
        class_names.label_of(name, NAMES)
    assert "\n" not in str(error.value)
