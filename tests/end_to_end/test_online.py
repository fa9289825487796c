"""Scores while a run trains: those of its weights, the best of which are kept, stopped or not."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny

from arcond_jax import build
from arcond_jax.cli import main
from arcond_jax.evaluation import samples, scoring
from arcond_jax.run import evaluating, online, restoring, training
from arcond_jax.training import writer

NUM_IMAGES = tiny.NUM_SCORED
FD = f"evaluation/{online.SCORE}"
config = tiny.scored_config


def rows(workdir):
    found = writer.read_rows(workdir / "metrics.jsonl")
    return {
        row["step"]: {x: y for x, y in row.items() if x.startswith("evaluation")} for row in found
    }


def record(workdir):
    """Step and value of the best checkpoint, and what it was scored with."""
    (step,) = (int(x.name) for x in (workdir / online.BEST / "checkpoints").iterdir())
    found = json.loads((workdir / online.BEST / online.RECORD).read_text())
    return {"step": step, "value": found["values"][str(step)], "evaluation": found["evaluation"]}


def test_scores_are_logged_with_what_they_cost(scored):
    found = rows(scored)
    assert sorted(found) == [2, 3, 4, 6] and found[3] == {}
    for step in (2, 4, 6):
        assert found[step].keys() == {FD, "evaluation/inception_score", "evaluation_share"}
        assert found[step][FD] > 0.0 and found[step]["evaluation/inception_score"] >= 1.0
        assert 0.0 < found[step]["evaluation_share"] < 1.0


def test_the_best_is_a_working_directory_of_its_own(scored, tmp_path):
    best, found = record(scored), rows(scored)
    assert best["value"] == min(row[FD] for row in found.values() if row)
    assert best["value"] == found[best["step"]][FD]
    trained = restoring.restore(scored / online.BEST)
    assert trained.step == best["step"] and trained.class_names is not None
    out = tmp_path / "out.npz"
    given = [
        "sample",
        "--checkpoint",
        scored / online.BEST,
        "--num_images",
        NUM_IMAGES,
        "--out",
        out,
    ]
    assert main.main([str(x) for x in given]) == 0
    # The same images by the same network are the same score.
    network = evaluating.classifier(trained.config, scored)
    real = evaluating.real(trained.config, network)
    drawn = samples.read_samples(out)
    card = scoring.score([(drawn.image_uint8, drawn.label)], network.extractor, real)
    assert card.measurements[online.SCORE] == pytest.approx(best["value"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [2, 4])
def test_gone_on_with_it_is_as_never_stopped(kept, scored, tmp_path):
    """A run that was killed after its checkpoint of that step, and maybe after a better one."""
    workdir = tmp_path / "run"
    shutil.copytree(scored, workdir)
    for folder in (workdir / "checkpoints").iterdir():
        if int(folder.name) > kept:
            shutil.rmtree(folder)
    assert training.train(config(), workdir)
    assert record(workdir) == record(scored)
    assert restoring.restore(workdir / online.BEST).step == record(scored)["step"]
    for step, row in rows(scored).items():
        assert rows(workdir)[step].get(FD) == row.get(FD)


def test_told_to_stop_nothing_is_scored(scored):
    trained = restoring.restore(scored, config=config())
    judge = online.judge(trained.config, scored)
    assert judge is not None
    best = online.Best(scored, trained, judge, position=lambda: {}, saved_config={})
    scores = online.Scores(trained, judge, None, best)
    state = build.train_state(trained.config, trained.mesh)
    assert scores(6, state, lambda: True) == {}


def test_a_worse_one_or_one_of_other_settings_is_not_compared(scored, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(scored / online.BEST, workdir / online.BEST)
    trained = restoring.restore(scored, config=config())
    state = build.train_state(trained.config, trained.mesh)
    judge = online.judge(trained.config, scored)
    assert judge is not None

    def best(*more, step=6, judge=judge):
        changed = dataclasses.replace(trained, config=config(*more), step=step)
        return online.Best(workdir, changed, judge, position=lambda: {}, saved_config={})

    value = record(scored)["value"]
    assert not best().offer(7, state, value + 1.0)
    assert record(workdir) == record(scored)
    # Killed after a better one was recorded and before it was saved, the one there is the best.
    path = workdir / online.BEST / online.RECORD
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"values": found["values"] | {"5": value - 1.0}}))
    assert not best().offer(7, state, value + 1.0)
    facts = judge.reference.facts | {"images": 7}
    other = dataclasses.replace(judge, reference=dataclasses.replace(judge.reference, facts=facts))
    assert other.identity != judge.identity
    # One of more images is another number, and what was best in a future that was left is gone.
    assert best("evaluation.num_images=90").offer(7, state, value + 1.0)
    assert record(workdir)["value"] == value + 1.0
    assert best("evaluation.num_images=90", step=5).offer(6, state, value + 2.0)
    assert record(workdir)["step"] == 6
    assert sorted(x.name for x in (workdir / "best/checkpoints").iterdir()) == ["6"]


def test_fewer_images_than_features_are_refused(scored, tmp_path):
    few = tmp_path / "few.npz"
    np.savez(few, arr_0=np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="10 images are fewer than the 32 features"):
        online.judge(config(f"evaluation.reference={few}"), scored)
    with pytest.raises(ValueError, match="num_images 3 must be at least 32, the features"):
        online.judge(config("evaluation.num_images=3"), scored)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["evaluation.every=0"], "evaluation.every 0 must be at least 1"),
        (["evaluation.reference=no.npz"], "evaluation.reference no.npz does not exist"),
        (["evaluation.inception=no"], "evaluation.inception no does not exist"),
        (["evaluation.every=None"], "num_images 80 does nothing while evaluation.every is None"),
        (["evaluation.folder=x"], "unknown config key evaluation.folder"),
    ],
)
def test_wrong_settings_are_one_line(more, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        training.train(config(*more), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not [*tmp_path.rglob("state")]
