"""What the documents show runs as it stands there."""

import pathlib

import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"


@pytest.mark.slow
def test_the_example_of_the_library_draws_images():
    lines = (DOCS / "library.md").read_text().partition("`build.train_step")[0].splitlines()
    names: dict = {}
    exec("\n".join(line[4:] for line in lines if line.startswith("    ")), names)
    assert names["images"].shape == (10, 8, 8, 1)


def test_the_example_of_a_network_scores_images():
    text = (DOCS / "library.md").read_text().partition("## Score by a network of your own")[2]
    lines = text.partition("## ")[0].splitlines()
    names: dict = {}
    exec("\n".join(line[4:] for line in lines if line.startswith("    ") or not line), names)
    measured = names["card"].measurements
    assert measured["frechet_distance"] > 0.0
    assert abs(measured["kernel_distance"]) < 1e-3
