"""Sweeps: paired, gone on with, and what a score says of its error."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest

from arcond_jax.analysis import sweep_report
from arcond_jax.cli import main
from arcond_jax.evaluation import frechet, jackknife, moments
from arcond_jax.run import sweep

pytestmark = pytest.mark.long

NUM_IMAGES = 200
OVER = ("sampling.guidance_scale=1,2", "sampling.latent_temperature=0.5")


def run(workdir, out, *more, over=OVER, num_images=NUM_IMAGES):
    given = ["--checkpoint", workdir, "--num_images", num_images, "--out", out, *more]
    return main.main(["sweep", *map(str, given), *(x for text in over for x in ("--over", text))])


def table(out):
    return json.loads((out / sweep.TABLE).read_text())


@pytest.fixture(scope="module")
def swept(scored, tmp_path_factory):
    out = tmp_path_factory.mktemp("swept") / "sweep"
    assert run(scored, out) == 0
    return out


def test_all_cells_are_scored_with_their_errors(swept):
    rows = table(swept)["rows"]
    assert [tuple(row["settings"].values()) for row in rows] == [
        (1.0, 0.5),
        (2.0, 0.5),
    ]
    for row in rows:
        assert row["num_images"] == NUM_IMAGES and len(row["left_out"]) == jackknife.NUM_GROUPS
        assert row["frechet_distance"] > 0.0 and row["inception_score"] >= 1.0
    text = (swept / "sweep.md").read_text()
    assert "Best (*): guidance_scale" in text and "±" in text and "- weights: " in text
    assert text.count(" * |") == 1
    assert min(PIL.Image.open(swept / "sweep.png").size) > 500


def test_a_cell_is_what_evaluate_says(swept, scored, tmp_path):
    row = table(swept)["rows"][1]
    settings = [f"--config.{name}={x}" for name, x in row["settings"].items()]
    given = ["--checkpoint", scored, "--num_images", NUM_IMAGES, "--out", tmp_path / "card.json"]
    assert main.main(["evaluate", *map(str, given), *settings]) == 0
    measured = json.loads((tmp_path / "card.json").read_text())["measurements"]
    assert measured["frechet_distance"] == pytest.approx(row["frechet_distance"], rel=1e-5)


def test_it_goes_on_with_what_is_there(swept, scored, tmp_path, monkeypatch):
    whole = table(swept)
    out = tmp_path / "sweep"
    out.mkdir()
    kept = whole | {"rows": whole["rows"][:1]}
    (out / sweep.TABLE).write_text(json.dumps(kept))
    drawn, score = [], sweep.Sweep._score

    def counted(self, i, num_images):
        drawn.append(i)
        return score(self, i, num_images)

    monkeypatch.setattr(sweep.Sweep, "_score", counted)
    assert run(scored, out) == 0
    assert drawn == [1]
    rows, before = table(out)["rows"], whole["rows"]
    for row in (*rows, *before):
        del row["seconds"]
    assert rows == before


@pytest.mark.parametrize(
    ("over", "more", "message"),
    [
        (["model.depth=1,2"], [], "--over model.depth: a sweep is over settings of sampling alone"),
        (["sampling.guidance_scal=1,2"], [], "did you mean sampling.guidance_scale?"),
        (["sampling.guidance_scale=1,x"], [], "sampling.guidance_scale wants float"),
        (["sampling.guidance_scale=1,,2"], [], "lacks a value"),
        (["sampling.guidance_scale=1,1"], [], "has a value twice"),
        ([OVER[0], OVER[0]], [], "--over sampling.guidance_scale is given twice"),
        (OVER, ["--seed", 1], "is of another sweep, whose seed is 0, here it is 1: name another"),
        (OVER, ["--num_images", 20], "20 images are fewer than the 32 features"),
        (OVER, ["--dtype", "bfloat16"], "--dtype does nothing without --inception"),
        (OVER, ["--batch_size", 0], "--batch_size must be at least 1"),
    ],
)
def test_what_is_wrong_is_one_line_and_draws_nothing(
    over, more, message, swept, scored, monkeypatch, capsys
):
    monkeypatch.setattr(sweep.Sweep, "_score", None)
    before = (swept / sweep.TABLE).read_bytes()
    assert run(scored, swept, *more, over=over) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert (swept / sweep.TABLE).read_bytes() == before


def test_a_damaged_table_is_one_line(swept, tmp_path):
    made = object.__new__(sweep.Sweep)
    whole = table(swept)
    made._out, made._made = tmp_path, whole["made"]
    row = whole["rows"][0]
    for damaged in (
        3,
        whole | {"made": 3},
        whole | {"rows": [{"settings": []}]},
        whole | {"rows": [row | {"left_out": 5}]},
        whole | {"rows": [row | {"frechet_distance": None}]},
    ):
        (tmp_path / sweep.TABLE).write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="is no table of a sweep: name another folder"):
            made._there()
    (tmp_path / sweep.TABLE).write_text(json.dumps(whole))
    assert [dataclasses.asdict(x) for x in made._there()] == whole["rows"]


def test_what_belongs_to_a_batch_goes_on_with_it_alone(scored, tmp_path, monkeypatch, capsys):
    """Images that are refined together depend on how many there are."""
    row = dict(settings={}, num_images=40, frechet_distance=1.0, left_out=None)
    row |= dict(inception_score=1.0, seconds=1.0)
    monkeypatch.setattr(
        sweep.Sweep, "_score", lambda self, i, _: sweep.Row(**row | {"settings": self._cells[i][0]})
    )
    refined = "--config.transport.kind=in_batch"
    out = tmp_path / "sweep"
    assert run(scored, out, refined, "--batch_size", 20) == 0
    assert run(scored, out, refined, "--batch_size", 20) == 0
    assert run(scored, out, refined, "--batch_size", 40) == 2
    assert "whose --batch_size is 20, here it is 40" in capsys.readouterr().err


def test_a_reference_of_few_images_is_refused(scored, tmp_path, capsys):
    few = tmp_path / "few.npz"
    np.savez(few, arr_0=np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), np.uint8))
    assert run(scored, tmp_path / "sweep", "--reference", few) == 2
    assert "10 images are fewer than the 32 features" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cells", "images", "least", "expected"),
    [
        (8, 800, 100, [(8, 100), (4, 200), (2, 400), (1, 800)]),
        (5, 800, 100, [(5, 100), (4, 200), (2, 400), (1, 800)]),
        (8, 800, 300, [(8, 400), (1, 800)]),
        (1, 800, 100, [(1, 800)]),
        (8, 150, 100, [(8, 150)]),
    ],
)
def test_rounds_of_halving(cells, images, least, expected):
    assert sweep.rounds(cells, images, halving=True, least=least) == expected
    assert sweep.rounds(cells, images, halving=False, least=least) == [(cells, images)]


@pytest.mark.slow
def test_halving_ends_with_one_of_all_images(scored, tmp_path):
    out, all_of_all = tmp_path / "sweep", tmp_path / "all"
    over = (OVER[0], "sampling.latent_temperature=0.5,1.0")
    assert run(scored, out, "--halving", over=over) == 0
    assert run(scored, all_of_all, over=over) == 0
    counts = [row["num_images"] for row in table(out)["rows"]]
    assert counts == [50] * 4 + [100] * 2 + [200]
    last, whole = table(out)["rows"][-1], table(all_of_all)["rows"]
    (same,) = (row for row in whole if row["settings"] == last["settings"])
    assert last["frechet_distance"] == pytest.approx(same["frechet_distance"], rel=1e-6)
    assert "Rows of fewer images compare among each other alone" in (out / "sweep.md").read_text()


def made(settings, value, left_out, num_images=100):
    return sweep.Row({"sampling.a": settings}, num_images, value, left_out, 2.0, 1.0)


def test_differences_are_paired():
    shared = np.linspace(0.0, 1.0, 10)
    rows = [made(x, 5.0 + x, list(5.0 + x + shared)) for x in (1.0, 2.0)]
    found = sweep.Found({"sampling.a": [1.0, 2.0]}, rows, "FID", {})
    assert found.best is rows[0]
    assert found.above_best(rows[1]) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    assert rows[0].error == pytest.approx(3.0 * shared.std())
    header, lines = sweep_report.table(found)
    assert header == ["a", "images", "FID", "above the best", "inception score"]
    assert [line[0] for line in lines] == ["1.0", "2.0"] and "*" in lines[0][2]


def test_words_have_places_in_the_picture():
    rows = [made(x, 5.0, None) for x in ("off", "feed")]
    found = sweep.Found({"sampling.a": ["off", "feed"]}, rows, "FID", {})
    (axis,) = sweep_report.picture(found).axes
    assert [x.get_text() for x in axis.get_xticklabels()] == ["off", "feed"]


def test_the_error_is_that_of_other_images():
    """The spread over 60 sets of Gaussian rows against the mean error."""
    rng, real = np.random.default_rng(0), moments.statistics(np.eye(4) + np.ones((4, 4)) / 9)
    group = jackknife.groups(400, 10)
    assert all(np.bincount(np.arange(400)[group == i] % 10).min() == 4 for i in range(10))
    distances, errors = [], []
    for _ in range(60):
        rows = rng.normal(0.3, 1.0, (400, 4))
        distances.append(frechet.frechet_distance(moments.statistics(rows), real))
        errors.append(jackknife.error(jackknife.left_out(rows, group, real) or []))
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.25)
    assert jackknife.left_out(rows[:4], jackknife.groups(4, 10), real) is None
