"""Official weights made one's own: converted, tuned on a folder, sampled by class name, scored."""

import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from test_cli import assert_one_line
from test_converted import call, convert
from test_converted_codes import FAMILIES, overrides_of, write_official

from arcond_jax import build
from arcond_jax.evaluation import samples
from arcond_jax.run import initial, restoring
from arcond_jax.training import writer

pytestmark = pytest.mark.long

NAMES = ("daisy", "rose", "tulip")


def write_images(folder, names, *, size, count):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(image).save(folder / split / name / f"{i}.png")


def short(*more):
    settings = (
        *("training.num_train_steps=2", "training.num_warmup_steps=1", "data.batch_size=4"),
        *("training.log_every=1", "training.checkpoint_every=2", "training.ema_decay=0"),
    )
    return [f"--config.{setting}" for setting in (*settings, *more)]


@pytest.fixture(scope="module")
def llamagen(tmp_path_factory):
    """A folder with a converted LlamaGen of ImageNet's classes, its tokenizer, and flowers."""
    folder = tmp_path_factory.mktemp("llamagen")
    name, tokenizer, _ = FAMILIES["llamagen"]
    overrides = (*overrides_of("llamagen"), "data.num_classes=1000")
    config = build.load_config(name, overrides)
    flags = ["--config", name, *(f"--config.{x}" for x in overrides)]
    for one, more in ((tokenizer, ["--weights", "raw"]), ("llamagen", [])):
        write_official(folder, one, config)
        tokenizer_of = [] if one == tokenizer else ["--tokenizer", folder / "vq_weights"]
        out = folder / f"{one}_weights"
        call([*convert(one, folder / f"{one}.safetensors", out, *flags, *more), *tokenizer_of])
    write_images(folder / "flowers", NAMES, size=8, count=4)
    return folder


def tune(llamagen, workdir, *more):
    overrides = [f"--config.{x}" for x in overrides_of("llamagen")]
    flags = ["--config", FAMILIES["llamagen"][0], *overrides]
    places = ("data.name=folder", f"data.directory={llamagen / 'flowers'}")
    places += (f"tokenizer.path={llamagen / 'vq_weights'}",)
    init = ["--init", llamagen / "llamagen_weights"]
    return ["train", "--workdir", workdir, *flags, *short(*places), *init, *more]


@pytest.fixture(scope="module")
def tuned(llamagen, tmp_path_factory):
    """Never to be written to."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    call(tune(llamagen, workdir, "--init_classes", "new"))
    return workdir


def test_official_weights_tuned_on_three_classes(llamagen, tuned, tmp_path, capsys):
    held = restoring.restore(llamagen / "llamagen_weights").params
    start = restoring.restore(tuned, step=0)
    assert start.class_names == NAMES
    table, of_imagenet = start.params["class_embed"]["table"], held["class_embed"]["table"]
    assert table.shape[0] == 4
    np.testing.assert_array_equal(table[-1], of_imagenet[-1])  # the row of no class
    assert not np.any(np.isin(table[:3], of_imagenet))
    for name in ("trunk", "code_embed"):
        jax.tree.map(np.testing.assert_array_equal, start.params[name], held[name])
    sample = ["sample", "--checkpoint", tuned, "--out", tmp_path / "other.npz"]
    message = "none of the 3 classes is named 'goldfish'"
    assert_one_line([*sample, "--class_name", "goldfish"], capsys, tmp_path, message)


@pytest.mark.slow
def test_what_was_tuned_is_sampled_by_name_and_scored(tuned, tmp_path, capsys):
    out = tmp_path / "roses.npz"
    sample = ["sample", "--checkpoint", tuned, "--num_images", 8, "--out", out]
    call([*sample, "--class_name", "rose"])
    drawn = samples.read_samples(out)
    assert set(drawn.label.tolist()) == {1} and drawn.metadata["label_names"] == list(NAMES)
    capsys.readouterr()
    workdir = shutil.copytree(tuned, tmp_path / "run")
    call(["evaluate", "--samples", out, "--checkpoint", workdir])
    assert "held out: daisy, rose, tulip" in capsys.readouterr().out


def test_other_folders_under_a_run_are_refused(llamagen, tuned, tmp_path, capsys):
    write_images(tmp_path / "other", ("daisy", "lily", "tulip"), size=8, count=4)
    again = tune(llamagen, tuned, f"--config.data.directory={tmp_path / 'other'}")
    message = "a run whose class 1 is 'rose', here it is 'lily'"
    assert_one_line(again, capsys, tmp_path, message)


def drafter_of(arguments):
    """The same command for the variant with a drafter."""
    return [str(x).replace("llamagen_b_256", "llamagen_b_256:drafter") for x in arguments]


def test_weights_of_another_model_or_size(llamagen, tmp_path, capsys):
    new = ["--init_classes", "new"]
    assert_one_line(
        tune(llamagen, tmp_path / "run"), capsys, tmp_path, "has 1000 classes, the config 3"
    )
    deeper = tune(llamagen, tmp_path / "run", *new, "--config.model.depth=2")
    assert_one_line(deeper, capsys, tmp_path, "there, (2, ")
    other = ["train", "--config", "digits:ar", "--workdir", tmp_path / "run"]
    other += ["--init", llamagen / "llamagen_weights", *new]
    assert_one_line(other, capsys, tmp_path, "has model llamagen, the config ar")
    command = drafter_of(tune(llamagen, tmp_path / "run", "--config.model.num_heads=2"))
    alone = [x for x in command if x not in ("--init", str(llamagen / "llamagen_weights"))]
    assert_one_line(alone, capsys, tmp_path, "learns to guess what a trained model draws: give --")


@pytest.mark.slow
def test_a_drafter_leaves_official_weights_as_they_are(llamagen, tmp_path, capsys):
    more = ["--init_classes", "new", "--config.model.num_heads=2"]
    workdir = tmp_path / "run"
    command = drafter_of(tune(llamagen, workdir, *more))
    call(command)
    held = restoring.restore(llamagen / "llamagen_weights").params
    tuned = restoring.restore(workdir).params
    for name in ("trunk", "code_embed", "final_norm", "code_head"):
        jax.tree.map(np.testing.assert_array_equal, tuned[name], held[name])
    call(command[: command.index("--init")])  # a run that is there goes on
    rows = writer.read_rows(workdir / "metrics.jsonl")
    assert all(0 < row["windows/acceptance_3"] <= 1 for row in rows)
    assert "windows/noised" not in rows[-1]
    # A plain model does not start from one with guesses.
    back = tune(llamagen, tmp_path / "other")
    back[back.index("--init") + 1] = workdir
    assert_one_line(back, capsys, tmp_path, "has a window_decoder, the config none: take the sec")


@pytest.mark.slow
def test_windows_are_tuned_around_official_weights(llamagen, tmp_path, caplog):
    workdir = tmp_path / "run"
    command = [str(x) for x in tune(llamagen, workdir, "--init_classes", "new")]
    command = [x.replace("llamagen_b_256", "llamagen_b_256:tensorar_v1") for x in command]
    call([*command, "--config.tensorar.noise_schedule=exponential"])
    held = restoring.restore(llamagen / "llamagen_weights").params
    start, end = (restoring.restore(workdir, step=x).params for x in (0, 2))
    jax.tree.map(np.testing.assert_array_equal, start["trunk"], held["trunk"])
    assert not np.any(start["window_encoder"]["gain"]) and np.any(end["window_encoder"]["gain"])
    row = writer.read_rows(workdir / "metrics.jsonl")[-1]
    np.testing.assert_allclose(
        row["windows/leak"], row["windows/masked"] - row["windows/noised"], atol=1e-5
    )
    said = [x.message for x in caplog.records if "teaches copying" in x.message]
    assert len(said) == 1 and said[0].startswith("windows/unchanged_1 ")
    sample = ["sample", "--checkpoint", workdir, "--num_images", 3, "--out", tmp_path / "x.npz"]
    call(sample)
    assert samples.read_samples(tmp_path / "x.npz").metadata["sampling"]["drafts"] == "feed"


@pytest.mark.slow
def test_windows_around_a_run_take_its_fitted_tokenizer_along(tmp_path):
    for variant, more in (("base", []), ("tensorar", ["--init", tmp_path / "base"])):
        flags = [f"--config.{x}" for x in tiny.overrides(variant)]
        call(
            [
                "train",
                "--config",
                f"digits:{variant}",
                "--workdir",
                tmp_path / variant,
                *flags,
                *more,
            ]
        )
    base, start = (
        restoring.restore(tmp_path / "base"),
        restoring.restore(tmp_path / "tensorar", step=0),
    )
    np.testing.assert_array_equal(base.tokenizer.codebook, start.tokenizer.codebook)
    jax.tree.map(np.testing.assert_array_equal, start.params["trunk"], base.params["trunk"])


def test_positions_are_interpolated_along_rows_and_columns():
    rows, columns = np.mgrid[0:8, 0:8]
    plane = np.stack([2.0 * rows, 3.0 * columns], axis=-1).reshape(64, 2)
    table = jax.numpy.asarray(np.concatenate([np.full((3, 2), 7.0), plane]), np.float32)
    made = initial.interpolated(table, (8, 8), (16, 16), None)
    assert made.shape == (3 + 256, 2)
    np.testing.assert_array_equal(made[:3], 7.0)
    # Pixel centres of the finer grid lie at (i + 1/2) / 2 - 1/2; away from edges a plane stays one.
    at = ((np.arange(16) + 0.5) / 2 - 0.5)[4:12]
    wanted = np.stack(np.meshgrid(2 * at, 3 * at, indexing="ij"), axis=-1)
    np.testing.assert_allclose(made[3:].reshape(16, 16, 2)[4:12, 4:12], wanted, atol=1e-4)
    # Two rows before the grid, and one after it, which stays where it is.
    kept = initial.interpolated(table, (8, 8), (16, 16), 2)
    np.testing.assert_array_equal(kept[-1], table[-1])


@pytest.mark.slow
def test_a_model_with_positions_starts_at_another_image_size(tmp_path, capsys):
    """MAR's tables have the slots of the buffer before the grid."""
    sizes = (
        *(f"model.{part}_{x}" for part in ("encoder", "decoder") for x in ("width=16",)),
        *("model.encoder_num_heads=2", "model.decoder_num_heads=2", "model.encoder_depth=1"),
        *("model.decoder_depth=2", "model.buffer_size=2", "tokenizer.patch_size=4"),
        *("diffusion_head.depth=1", "diffusion_head.width=16", "loss.num_copies=1"),
    )
    path = tmp_path / "mine.py"
    path.write_text(
        "from arcond_jax import build\n"
        "def get_config():\n"
        "    config = build.config(model='mar', tokenizer='pixels')\n"
        "    config.data.update(image_size=8, num_channels=3, num_classes=2)\n"
        "    config.sampling.num_ar_steps = 4\n"
        "    return config\n"
    )
    write_images(tmp_path / "images", ("a", "b"), size=16, count=4)
    flags = short(*sizes, f"data.directory={tmp_path / 'images'}")
    call(["train", "--config", path, "--workdir", tmp_path / "small", *flags])
    larger = ["train", "--config", path, "--workdir", tmp_path / "large", *flags]
    call([*larger, "--init", tmp_path / "small", "--config.data.image_size=16"])
    small, large = (restoring.restore(tmp_path / x) for x in ("small", "large"))
    start = restoring.restore(tmp_path / "large", step=0).params
    assert start["encoder_position"].shape == (2 + 16, 16)
    np.testing.assert_array_equal(
        start["encoder_position"][:2], nn.unbox(small.params)["encoder_position"][:2]
    )
    np.testing.assert_array_equal(large.tokenizer.mean, small.tokenizer.mean)
