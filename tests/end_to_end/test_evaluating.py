"""Scores from the command line: of files, of a model that is drawn on the way, by any network."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from test_cli import assert_one_line, some_samples

from arcond_jax.cli import main
from arcond_jax.convert import inception as inception_table
from arcond_jax.convert import table
from arcond_jax.data import digits, images
from arcond_jax.evaluation import features, inception, samples

TESTS = pathlib.Path(__file__).parents[1]
PLAIN = "--config.transport.kind=none"


def call(*arguments):
    assert main.main([str(argument) for argument in arguments]) == 0


@pytest.fixture
def workdir(finished, copy_of, quick_classifier):
    """The tiny run with a classifier."""
    target = copy_of(finished)
    quick_classifier.save(target / "classifier.npz")
    return target


@pytest.fixture
def real(tmp_path):
    """Held-out digits as a file of images."""
    path = tmp_path / "real.npz"
    source = digits.Digits("held_out")
    np.savez(path, arr_0=images.image_to_uint8(source.image), label=source.label)
    return path


@pytest.mark.long
def test_a_model_is_scored_as_its_samples_are(workdir, real, tmp_path, capsys):
    """Of the same seed, whatever the batches; and nothing but the card is written."""
    drawn = ["--checkpoint", workdir, PLAIN, "--num_images", 24, "--seed", 3]
    call("sample", *drawn, "--out", tmp_path / "s.npz")
    scored = ["evaluate", "--checkpoint", workdir, PLAIN, "--reference", real, "--allow_singular"]
    call(*scored, "--samples", tmp_path / "s.npz", "--out", tmp_path / "file.json")
    before = sorted(workdir.rglob("*"))
    call("evaluate", *drawn, *scored[3:], "--batch_size", 10)
    assert sorted(set(workdir.rglob("*")) - set(before)) == [workdir / "evaluation.card.json"]
    assert "Frechet distance (not FID: other features)" in capsys.readouterr().out
    of_file = json.loads((tmp_path / "file.json").read_text())
    of_model = json.loads((workdir / "evaluation.card.json").read_text())
    assert of_file["measurements"].keys() == of_model["measurements"].keys()
    for name, value in of_file["measurements"].items():
        assert of_model["measurements"][name] == pytest.approx(value, rel=1e-6)
    assert of_model["samples"]["labels"] == "balanced"
    assert of_model["samples"]["sampling seed"] == 3
    assert of_model["samples"]["of each class"] == "2 to 3"
    assert of_model["reference"]["file"] == str(real)
    assert of_model["reference"]["images"] == 360


@pytest.mark.long
def test_a_folder_is_scored_as_its_file(workdir, tmp_path):
    pngs = tmp_path / "s"
    given = ["--num_images", 40, "--out", tmp_path / "s.npz", "--png_dir", pngs]
    call("sample", "--checkpoint", workdir, PLAIN, *given)
    call("evaluate", "--checkpoint", workdir, PLAIN, "--samples", pngs)
    with np.load(tmp_path / "s.npz") as held:
        np.savez(tmp_path / "foreign.npz", arr_0=held["arr_0"])
    call("evaluate", "--checkpoint", workdir, PLAIN, "--samples", tmp_path / "foreign.npz")
    names = ("s.images.card.json", "foreign.card.json")
    cards = [json.loads((tmp_path / name).read_text()) for name in names]
    assert cards[0]["measurements"] == cards[1]["measurements"]
    assert cards[0]["reference"]["split"] == "held_out"


def test_held_out_images_are_the_reference_where_none_is_given(workdir, tmp_path):
    call("evaluate", "--checkpoint", workdir, PLAIN, "--num_images", 40, "--labels", "drawn")
    card = json.loads((workdir / "evaluation.card.json").read_text())
    assert card["reference"]["data"] == "digits"
    assert card["reference"]["split"] == "held_out"
    assert card["samples"]["labels"] == "drawn"
    assert 0.0 <= card["measurements"]["class_accuracy"] <= 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give --samples, or --checkpoint and --num_images to draw them"),
        ("--samples S --num_images 9 --checkpoint W", "give --samples, or --checkpoint and --num"),
        ("--num_images 9", "--checkpoint is missing"),
        ("--samples S --reference S", "--checkpoint is missing: the workdir that images are drawn"),
        ("--samples S --inception I", "--reference is missing: real images to compare with"),
        ("--samples S --checkpoint W --labels drawn", "--labels does nothing without --num_images"),
        ("--samples S --checkpoint W --dtype bfloat16", "--dtype does nothing without --inception"),
        ("--samples S --checkpoint W --distances float16", "--distances does nothing for samples"),
        ("--samples S --checkpoint W --allow_singular", "--allow_singular does nothing for samp"),
        ("--samples S --checkpoint W --out D/no/x.json", "does not exist: create it first"),
        ("--checkpoint W --num_images 1", "--num_images must be at least 2"),
        ("--checkpoint W --num_images 9 --seed -1", "seed -1 must be from 0"),
        ("--checkpoint W --num_images 9", "has no calibrated refiner: run `arcond calibrate"),
        ("--samples S --reference S --inception W", "holds no Inception weights: make them with"),
        ("--samples N --reference S --inception W", "no such samples file"),
    ],
)
def test_evaluate_refuses_in_one_line(arguments, message, finished, tmp_path, capsys):
    some_samples(tmp_path / "s.npz")
    places = {"S": tmp_path / "s.npz", "W": finished, "N": tmp_path / "none.npz", "I": tmp_path}
    words = ["evaluate", *(places.get(word, word) for word in arguments.split())]
    words = [str(word).replace("D/", f"{tmp_path}/") for word in words]
    assert_one_line(words, capsys, tmp_path, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--npz S", "--inception is missing"),
        ("--npz S --inception W --split train", "--split does nothing without --config"),
        ("--npz S --inception W --image_size 8", "--image_size does nothing without --images"),
        ("--images D --inception W --resize fast", "--resize does nothing without --image_size"),
        ("--npz S --inception W --num_features -1", "--num_features must be at least 0"),
        ("--npz S --inception W --num_features 5", "--num_features does nothing with --npz"),
        ("--npz S --inception W", "holds no Inception weights"),
    ],
)
def test_reference_refuses_in_one_line(arguments, message, finished, tmp_path, capsys):
    some_samples(tmp_path / "s.npz")
    places = {"S": tmp_path / "s.npz", "W": finished, "D": tmp_path}
    words = [places.get(word, word) for word in arguments.split()]
    words = ["reference", *words, "--out", tmp_path / "r.npz"]
    assert_one_line(words, capsys, tmp_path, message)


@pytest.mark.slow
def test_inception_from_the_command_line(tmp_path, capsys, monkeypatch):
    """A reference with its card, samples as a file and as pictures, and what does not fit it."""
    monkeypatch.syspath_prepend(TESTS / "parity")
    from checks_inception import drawn_weights
    from golden import load

    monkeypatch.setattr(features, "BATCH_SIZE", 3)
    weights, ref = tmp_path / "inception", tmp_path / "ref.npz"
    golden = load(TESTS / "golden" / "parity" / "fid_inception.npz")
    abstract = inception.abstract_params()
    params = table.to_ours(inception_table.rows(abstract), drawn_weights(golden.config), abstract)
    about = {"source": "random", "source_sha256": "ab" * 32, "published": False}
    inception.save(weights, params, about)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "pngs").mkdir()
    for i, image in enumerate(drawn):
        Image.fromarray(image).save(tmp_path / "pngs" / f"{i:03d}.png")
    samples.write_samples(tmp_path / "s.npz", drawn, np.arange(6), num_classes=10)
    (tmp_path / "real").mkdir()
    for i in range(6):
        photo = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(photo).save(tmp_path / "real" / f"{i}.png")
    by = ["--inception", weights]
    call("reference", "--images", tmp_path / "real", "--image_size", 32, *by, "--out", ref)
    card = json.loads((tmp_path / "ref.card.json").read_text())
    assert card["weights"] == "ab" * 32 and card["crop"] == "the square in the middle"
    capsys.readouterr()
    for name in ("s.npz", "pngs"):
        call("evaluate", "--samples", tmp_path / name, "--reference", ref, *by, "--allow_singular")
    cards = [json.loads((tmp_path / f"{x}.card.json").read_text()) for x in ("s", "pngs")]
    assert cards[0]["measurements"] == cards[1]["measurements"]
    assert cards[0]["names"]["frechet_distance"].startswith("Frechet distance (not FID: weights of")
    evaluate = ["evaluate", "--samples", tmp_path / "s.npz", "--reference", ref, *by]
    other = [*evaluate, "--preprocessing", "pytorch_fid"]
    assert_one_line(other, capsys, tmp_path, "was made with preprocessing tf, this evaluation has")
    call(*evaluate)
    assert "no frechet distance: 6 images are fewer than the 2048" in capsys.readouterr().out
