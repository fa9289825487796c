"""A run on a cache is the run on its images, stopped or not, and is sampled and scored like it."""

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from test_cli import assert_one_line
from test_run import assert_same_run, interrupt

from arcond_jax import build, checkpoint
from arcond_jax.build import tokens
from arcond_jax.cli import main
from arcond_jax.evaluation import samples
from arcond_jax.run import caching, restoring, training
from arcond_jax.training import writer

pytestmark = pytest.mark.long

FLOAT32 = caching.Options(dtype="float32", shard_images=500)


def cached_config(cache, variant="joint", *more):
    given = {"data.name": "cache", "data.directory": str(cache)}
    return build.with_overrides(build.changed(tiny.config(variant), given), more)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of digits."""
    out = tmp_path_factory.mktemp("cached") / "cache"
    caching.encode(tiny.config(), [], out, FLOAT32)
    return out


@pytest.fixture(scope="module")
def run(cache):
    """On the cache."""
    workdir = cache.with_name("run")
    assert training.train(cached_config(cache), workdir)
    return workdir


def test_a_run_on_a_cache_is_the_run_on_its_images(run, finished):
    """Losses, weights and the bank of conditions, to the last bit."""
    assert_same_run(run, finished)
    ours, theirs = (restoring.restore(workdir).bank for workdir in (run, finished))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_stopped_on_a_cache_and_gone_on_with_it_is_the_same(cache, finished, tmp_path, monkeypatch):
    config = cached_config(cache)
    with monkeypatch.context() as patched:
        interrupt(patched, at_batch=3)
        assert not training.train(config, tmp_path / "run")
    assert training.train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", finished)


def test_another_tokenizer_is_refused_when_a_run_goes_on(run, tmp_path, copy_of, capsys):
    fitted = tiny.config("joint", "tokenizer.num_codes=8", "seed=1")
    caching.encode(fitted, [], tmp_path / "cache", FLOAT32)
    arguments = ["train", "--config", "digits:joint", "--workdir", copy_of(run, last_step=4)]
    settings = (*tiny.overrides(), "data.name=cache")
    flags = [f"--config.{x}" for x in (*settings, f"data.directory={tmp_path / 'cache'}")]
    message = "cache was encoded by a tokenizer with parameters "
    assert_one_line([*arguments, *flags], capsys, tmp_path / "cache", message, "of this run are")


@pytest.mark.slow
def test_it_is_calibrated_sampled_and_evaluated(run, copy_of, tmp_path, capsys):
    workdir, out = copy_of(run), tmp_path / "s.npz"
    evaluate = ["evaluate", "--samples", out, "--checkpoint", workdir]
    for command in (
        ["calibrate", "--checkpoint", workdir],
        ["sample", "--checkpoint", workdir, "--num_images", "20", "--out", out],
        [*evaluate, "--config.data.name=digits"],
    ):
        assert main.main([str(x) for x in command]) == 0
    assert "digits, held out" in capsys.readouterr().out
    message = "data.name=cache holds no images (it was encoded from digits): give them by "
    assert_one_line(evaluate, capsys, tmp_path, message, "--config.data.directory=IMAGES")


@pytest.mark.slow
def test_a_pair_from_weights_to_scores(tmp_path, capsys):
    """Measured, encoded, trained on, stopped and gone on with, sampled in one step, and scored."""
    images, cache, run = (tmp_path / name for name in ("images", "cache", "run"))
    make_images(images)
    level = dict(multipliers="(1,1)", width=32, num_blocks=1)
    own = {"kl": dict(latent_channels=3), "vq": dict(latent_channels=32, num_codes=16)}
    pair = [
        f"tokenizer.{name}_{key}={value}"
        for name in own
        for key, value in (level | own[name] | {"path": tmp_path / name}).items()
    ]
    sizes = [*tiny.BACKBONE, *tiny.HEAD, "tensorar.depth=1", "loss.num_copies=1"]
    data = ["data.image_size=16", "data.num_classes=2", "data.batch_size=4"]
    steps = ["training.num_train_steps=3", "training.num_warmup_steps=1", "training.log_every=1"]
    steps += ["training.dtype=float32"]
    few = ["warm_start=0.4", "solver=ddim", "spacing=trailing", "num_head_evaluations=1"]
    given = [*pair, *sizes, *data, *steps, *(f"sampling.{x}" for x in few)]
    config = build.load_config("joint_xl_imagenet256:joint_tensorar", given)
    for gives, name in (("latents", "kl"), ("codes", "vq")):
        part = build.abstract_tokenizer(tokens.part(config, gives))
        params = tiny.random_params(part.params, scale=0.1)
        checkpoint.save_tree(f"{tmp_path / name}/weights", {"params": params}, {})

    def arcond(command, *arguments, cached=True, code=0):
        where = {"cache": cache} if cached else {"folder": images}
        ((name, directory),) = where.items()
        places = (f"data.name={name}", f"data.directory={directory}")
        if command != "sample":
            arguments += ("--config", "joint_xl_imagenet256:joint_tensorar")
            arguments += tuple(f"--config.{x}" for x in (*given, *places))
        assert main.main([command, *map(str, arguments)]) == code
        return capsys.readouterr()

    measured = arcond("estimate", cached=False).out
    encoded = arcond("encode", "--out", cache, "--dtype", "float32", cached=False).out
    assert measured.count("\n") == 2 and encoded.endswith(measured)
    refused = arcond("train", "--workdir", run, cached=False, code=2).err
    assert "sampling.warm_start 0.4 starts from the Gaussian behind each code" in refused
    assert not run.exists()
    arcond("train", "--workdir", run)
    rows = writer.read_rows(run / "metrics.jsonl")
    assert len(rows) == 3 and all(np.isfinite(row["loss"]) for row in rows)
    assert restoring.restore(run).tokenizer.code_law.cholesky.shape == (16, 3, 3)
    given[given.index("training.num_train_steps=3")] = "training.num_train_steps=4"
    arcond("train", "--workdir", run)
    assert len(writer.read_rows(run / "metrics.jsonl")) == 4
    out = tmp_path / "samples.npz"
    arcond("sample", "--checkpoint", run, "--num_images", 20, "--out", out)
    drawn = samples.read_samples(out)
    assert drawn.image_uint8.shape == (20, 16, 16, 3) and drawn.image_uint8.std() > 0
    scored = ["--samples", out, "--checkpoint", run, "--config.data.name=folder"]
    assert main.main(["evaluate", *map(str, scored), f"--config.data.directory={images}"]) == 0
    assert "folder, held out" in capsys.readouterr().out


def make_images(root):
    """Two classes of coloured noise, ten to train on and four held out."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


@pytest.mark.slow
def test_mirrored_pairs_give_the_losses_of_mirrored_images(tmp_path):
    """In float16 to what its rounding of the latents, 2^-11 of them, does to a loss."""
    config = tiny.config("joint", "data.random_flip=True")
    losses = []
    for name in ("images", *caching.DTYPES):
        tried, shown = config, []
        if name != "images":
            caching.encode(config, [], tmp_path / name, caching.Options(dtype=name))
            given = {"data.name": "cache", "data.directory": str(tmp_path / name)}
            tried = build.changed(config, given)
        training.train(
            build.changed(tried, {"training.samples_every": 6}),
            tmp_path / f"run_{name}",
            show=lambda step, image_uint8, label, names, shown=shown: shown.append(names),
        )
        assert shown == [tuple("0123456789")]
        rows = writer.read_rows(tmp_path / f"run_{name}" / "metrics.jsonl")
        losses.append([row["loss"] for row in rows])
    of_images, of_float16, of_float32 = losses
    assert of_float32 == of_images
    np.testing.assert_allclose(of_float16, of_images, rtol=0.02)
