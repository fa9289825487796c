"""The commands: what a user gets wrong costs one line, exit code 2, and nothing on disk."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from PIL import Image

from arcond_jax.cli import main
from arcond_jax.evaluation import classifier, samples
from arcond_jax.run import drawing, restoring
from arcond_jax.training import writer
from arcond_jax.transport import refiners


def train(workdir, *more, config="digits:joint", variant="joint"):
    flags = [f"--config.{override}" for override in (*tiny.overrides(variant), *more)]
    return ["train", "--config", config, "--workdir", str(workdir), *flags]


def files_below(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def assert_one_line(arguments, capsys, folder, *expected):
    before = files_below(folder)
    code = main.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1 and error.endswith("\n"), error
    assert error.startswith(f"arcond {arguments[0]}: ")
    for part in expected:
        assert part in error
    assert files_below(folder) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dept=3", "unknown config key model.dept: did you mean model.depth?"),
        ("model.depth=deep", "config key model.depth wants int, not 'deep'"),
        ("tensorar.window=0", "tensorar.window 0 must be at least 1"),
        ("tensorar.window=17", "tensorar.window 17 must be from 1 to the 16 positions"),
        ("mesh.fsdp=16", "needs 16 devices, but there are 1"),
        ("data.batch_size=1600", "1600 does not fit a dataset of 1437 images"),
    ],
)
def test_train_with_a_wrong_setting(override, message, tmp_path, capsys):
    assert_one_line(train(tmp_path / "run", override), capsys, tmp_path, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("digits:big", "digits has no variant 'big': choose one of joint, ar, tensorar, base, mar"),
        ("nothing.py", "no config file nothing.py: give one, or the name of one that comes with"),
    ],
)
def test_train_without_a_config(config, message, tmp_path, capsys):
    assert_one_line(train(tmp_path / "run", config=config), capsys, tmp_path, message)


def test_train_below_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    workdir = tmp_path / "file" / "run"
    arguments = train(workdir, config="digits:base", variant="base")
    assert_one_line(arguments, capsys, tmp_path, "Cannot write to", "file/run")


def test_train_where_another_run_is(finished, copy_of, capsys):
    workdir = copy_of(finished)
    assert_one_line(
        train(workdir, "model.width=32"), capsys, workdir, "model.width=16", "the config says 32"
    )


def truncate_arrays(folder: pathlib.Path) -> None:
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("command", ["train", "sample", "calibrate"])
def test_truncated_checkpoints(command, finished, copy_of, capsys, tmp_path):
    workdir = copy_of(finished)
    truncate_arrays(workdir / "checkpoints" / "6" / "state")
    arguments = {
        "train": train(workdir, "training.num_train_steps=8"),
        "sample": ["sample", "--checkpoint", workdir, "--out", tmp_path / "out.npz"],
        "calibrate": ["calibrate", "--checkpoint", workdir],
    }[command]
    assert_one_line(arguments, capsys, tmp_path, "checkpoint of step 6 in", "is damaged", "delete")


@pytest.mark.slow
def test_as_a_program_a_truncated_checkpoint_is_named(finished, copy_of, tmp_path):
    workdir = copy_of(finished)
    truncate_arrays(workdir / "checkpoints" / "6" / "state")
    arguments = ["sample", "--checkpoint", workdir, "--out", tmp_path / "out.npz"]
    made = subprocess.run(
        [sys.executable, "-m", "arcond_jax", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 2
    (line,) = made.stderr.splitlines()
    assert line.startswith("arcond sample: The checkpoint of step 6 in ") and "is damaged" in line


def test_a_checkpoint_with_another_data_position(finished, copy_of, capsys):
    workdir = copy_of(finished)
    step = workdir / "checkpoints" / "6"
    shutil.rmtree(step / "digests")
    (step / "data" / "metadata").write_text('{"other": 3}')
    arguments = train(workdir, "training.num_train_steps=8")
    assert_one_line(arguments, capsys, workdir, "checkpoint of step 6 in", "is damaged (its data")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--per_class", "0"], "--per_class 0 must be at least 1"),
        (["--system", "a"], "--system a is given twice: give each a name of its own"),
    ],
)
def test_compare_with_a_wrong_setting(more, message, finished, capsys):
    arguments = ["compare", "--checkpoint", finished, "--system", "a", *more]
    assert_one_line(arguments, capsys, finished, message)


@pytest.mark.parametrize("name", ["--batch_size", "--num_runs"])
def test_bench_of_nothing(name, tmp_path, capsys):
    arguments = ["bench", "--config", "digits:ar", name, "0"]
    assert_one_line(arguments, capsys, tmp_path, f"{name} 0 must be at least 1")


def sample(workdir, *more):
    return ["sample", "--checkpoint", workdir, "--out", workdir / "out.npz", *more]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--label", "10"], "label 10 is not a class: use 0 to 9"),
        (["--label", "-1"], "label -1 is not a class: use 0 to 9"),
        (["--class-name", "zero"], "none of the 10 classes is named 'zero', none is close"),
        (["--seed", "4294967296"], "seed 4294967296 must be from 0 to 4294967295"),
        (["--num_images", "0"], "--num_images and --batch_size must be at least 1"),
        (["--config.sampling.stride=2"], "unknown config key sampling.stride: "),
        (["--report", "w.html", "--num_images", "1"], "a report compares images: draw at least 2"),
        (["--report", "w.html", "--config.tensorar.window=1"], "and digits_joint has none"),
        (["--report", "w.json"], "w.json is the name of the report's numbers: end it in .html"),
        (["--config.model.width=32"], "holds a run with model.width=16, the config says 32"),
        ([], "has no calibrated refiner: run `arcond calibrate --checkpoint"),
    ],
)
def test_sample_with_a_wrong_setting(more, message, finished, capsys):
    assert_one_line(sample(finished, *more), capsys, finished, message)


def test_sample_without_a_checkpoint(tmp_path, capsys):
    out = ["--out", tmp_path / "out.npz"]
    arguments = ["sample", "--checkpoint", tmp_path / "nothing", *out]
    assert_one_line(arguments, capsys, tmp_path, "does not exist: train there first")


@pytest.mark.parametrize("left", [None, "weights.orbax-checkpoint-tmp"])
def test_sample_from_half_a_conversion(left, tmp_path, capsys):
    (tmp_path / "half" / (left or "")).mkdir(parents=True)
    arguments = ["sample", "--checkpoint", tmp_path / "half", "--out", tmp_path / "out.npz"]
    message = "a conversion was not finished there, so run `arcond convert` again"
    assert_one_line(arguments, capsys, tmp_path, message)


def test_sample_into_a_missing_folder(finished, capsys):
    out = ["--out", finished / "missing" / "out.npz"]
    arguments = ["sample", "--checkpoint", finished, *out]
    assert_one_line(arguments, capsys, finished, "does not exist: create it first")


@pytest.mark.long
def test_an_empty_bank_is_filled_before_it_refines(finished, copy_of, capsys):
    workdir = copy_of(finished, last_step=4)
    assert restoring.restore(workdir).bank is None
    assert main.main(["calibrate", "--checkpoint", str(workdir)]) == 0
    assert (workdir / "refiner").is_dir()


def test_nothing_to_calibrate(finished, capsys):
    arguments = ["calibrate", "--checkpoint", finished, "--config.transport.kind=none"]
    assert_one_line(arguments, capsys, finished, "transport.kind=none needs no calibration")


def test_evaluate_without_samples(finished, tmp_path, capsys):
    path = tmp_path / "samples.npz"
    arguments = ["evaluate", "--samples", path, "--checkpoint", finished]
    assert_one_line(arguments, capsys, tmp_path, str(path))
    image_uint8 = np.zeros((4, 8, 8, 1), np.uint8)
    samples.write_samples(path, image_uint8, np.arange(4), num_classes=10)
    assert_one_line(arguments, capsys, tmp_path, "the samples do not say how they were made")
    path.write_bytes(path.read_bytes()[:-100])
    assert_one_line(arguments, capsys, tmp_path, str(path))


def some_samples(path, *, count=40, size=8, num_classes=10, **more):
    image = np.random.default_rng(0).integers(0, 256, (count, size, size, 1)).astype(np.uint8)
    made = dict(sampling={}, refinement={}, seed=0, checkpoint_step=6) | more
    samples.write_samples(path, image, np.arange(count) % 10, num_classes=num_classes, **made)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(num_classes=11), "the samples are of 11 classes, the run of 10: their labels do not"),
        (dict(label_names=["a"] * 10), "the samples are of the classes ['a', "),
        (dict(count=3), "3 samples are too few to be scored: draw at least 4"),
        (dict(size=9), "The samples are [9, 9, 1], the real images [8, 8, 1]"),
        (dict(seed=None), "the samples' seed is None, no whole number"),
    ],
)
def test_evaluate_refuses_other_samples_before_it_trains(
    more, message, finished, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(classifier, "train_classifier", None)
    some_samples(tmp_path / "samples.npz", **more)
    arguments = ["evaluate", "--samples", tmp_path / "samples.npz", "--checkpoint", finished]
    assert_one_line(arguments, capsys, tmp_path, message)


def test_no_classifier_is_trained_that_cannot_be_kept(
    finished, copy_of, tmp_path, capsys, monkeypatch
):
    """A link to nowhere stands for a folder that cannot be written to, also to root."""
    monkeypatch.setattr(classifier, "train_classifier", None)
    workdir = copy_of(finished)
    (workdir / "classifier.npz").symlink_to(tmp_path / "nowhere" / "classifier.npz")
    some_samples(tmp_path / "samples.npz")
    arguments = ["evaluate", "--samples", tmp_path / "samples.npz", "--checkpoint", workdir]
    assert_one_line(arguments, capsys, tmp_path, "classifier.npz does not exist: create it first")


def test_a_card_that_cannot_be_written_is_printed(
    finished, copy_of, quick_classifier, tmp_path, capsys
):
    workdir, path = copy_of(finished), tmp_path / "samples.npz"
    quick_classifier.save(workdir / "classifier.npz")
    some_samples(path)
    (tmp_path / "samples.card.json").mkdir()  # stands for a place that cannot be written to
    arguments = ["evaluate", "--samples", str(path), "--checkpoint", str(workdir)]
    assert main.main(arguments) == 2
    shown = capsys.readouterr()
    assert "Frechet distance" in shown.out and "written" not in shown.out
    assert shown.err.count("\n") == 1 and "samples.card.json cannot be written" in shown.err
    assert main.main([*arguments, "--out", str(tmp_path / "card.json")]) == 0
    assert json.loads((tmp_path / "card.json").read_text())["measurements"]["precision"] >= 0.0


def test_status_of_a_complete_run(finished, tmp_path, capsys):
    assert main.main(["status", "--workdir", str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].split(maxsplit=1) == ["step:", "6 of 6, digits_joint"]
    assert "steps/s" in lines[1] and "images/s" in lines[1]
    assert lines[2].endswith("none: complete")
    assert "step 6, " in lines[3]
    assert lines[4] == "skipped updates: 0"
    assert_one_line(["status", "--workdir", tmp_path], capsys, tmp_path, "holds no run")


def test_status_of_a_run_under_way(finished, copy_of, capsys):
    workdir = copy_of(finished, last_step=4)
    rows = writer.read_rows(workdir / "metrics.jsonl")[:5]
    rows[-1] |= {"steps_per_second": 0.01, "mfu": 0.42, "skipped_updates": 2.0}
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "los'
    (workdir / "metrics.jsonl").write_text(text)
    assert main.main(["status", "--workdir", str(workdir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("5 of 6, digits_joint")
    assert "0.01 steps/s" in lines[1] and "MFU 42%" in lines[1]
    assert "1 min 40 s; last line" in lines[2]
    assert "step 4, " in lines[3]
    assert lines[4] == "skipped updates: 2"

    # 100 seconds a step, a line each step, and an hour for what lies between two steps.
    for silent, stopped in ((3700, False), (3900, True)):
        os.utime(workdir / "metrics.jsonl", (time.time() - silent,) * 2)
        assert main.main(["status", "--workdir", str(workdir)]) == 0
        left = capsys.readouterr().out.splitlines()[2]
        assert "last line 1 h " in left and ("stopped it seems" in left) == stopped


def test_train_sample_plain(finished, tmp_path, capsys):
    out = tmp_path / "plain.npz"
    arguments = ["sample", "--checkpoint", str(finished), "--out", str(out), "--num_images", "16"]
    arguments += ["--config.transport.kind=none", "--png", str(tmp_path / "sheet.png")]
    arguments += ["--png_dir", str(tmp_path / "new" / "images")]
    assert main.main(arguments) == 0
    assert f"16 images: {out}" in capsys.readouterr().out
    drawn = samples.read_samples(out)
    assert drawn.image_uint8.shape == (16, 8, 8, 1)
    assert list(drawn.label) == [*range(10), *range(6)]
    assert drawn.metadata["refinement"] == {}
    assert drawn.metadata["checkpoint_step"] == 6
    assert (tmp_path / "sheet.png").stat().st_size > 0
    images = [np.asarray(Image.open(tmp_path / f"new/images/{i:06d}.png")) for i in range(16)]
    np.testing.assert_array_equal(np.stack(images), drawn.image_uint8[..., 0])
    assert_one_line(arguments, capsys, tmp_path, "--png_dir", "is there already: give a new folder")
    with pytest.raises(SystemExit):
        main.main(["sample", "--help"])
    assert "arr_0" in capsys.readouterr().out


@pytest.mark.long
def test_a_report_of_windows_changes_no_image(finished, tmp_path):
    page = tmp_path / "windows.html"
    arguments = ["sample", "--checkpoint", str(finished), "--num_images", "16", "--batch_size", "8"]
    arguments += ["--config.transport.kind=none", "--out", str(tmp_path / "out.npz")]
    assert main.main([*arguments, "--report", str(page)]) == 0
    plain = drawing.Drawer(restoring.restore(finished)).images(
        refiners.Identity(), np.arange(16) % 10, seed=0, batch_size=8
    )
    np.testing.assert_array_equal(samples.read_samples(tmp_path / "out.npz").image_uint8, plain)
    found = json.loads((tmp_path / "windows.json").read_text())
    (entry,) = found["entries"]
    assert 0.0 < entry["flips"] <= 1.0 and entry["num_drafts"] == 16 * 15
    assert found["others_of_same_label"] == 12 / 16 and found["own_drafts"] == "off"
    counts = found["cost"]["operations_per_position"]
    assert 0 < counts["base"] < counts["drafts_off"] < counts["as_drawn"]
    assert min(found["cost"]["seconds_per_image"].values()) > 0
    text = page.read_text()
    assert "no evidence of useful refinement" in text and "data:image/png" in text


@pytest.mark.parametrize("command", main.COMMANDS)
def test_help_of_a_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as raised:
        main.main([command, "--help"])
    assert raised.value.code == 0
    assert f"  arcond {command}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as raised:
        main.main(["--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    assert set(main.COMMANDS) <= set(shown.split())


def test_as_a_program_errors_are_one_line_too(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "arcond_jax", *train(tmp_path / "run", "mesh.fsdp=16")],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("arcond train: mesh data 1 x fsdp 16")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sample --checkpoint run --out y.npz --png ./y.npz", "--out and --png are the same file"),
        ("evaluate --samples y.npz --checkpoint run --out y.npz", "--samples and --out are the"),
    ],
)
def test_a_file_does_not_replace_another(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "y.npz").write_text("kept")
    assert main.main(arguments.split()) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "y.npz").read_text() == "kept"
