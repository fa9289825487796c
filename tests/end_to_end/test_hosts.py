"""Several processes as one program: the same numbers and files, one stop, one line for who is gone.

Two processes against one, which has as many CPU devices.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import hosts
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from arcond_jax import build
from arcond_jax.run import training
from arcond_jax.training import writer

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "local_multiprocess.sh"
SMALL = dict(variant="base", overrides=tiny.unrefined)  # codes alone: compiles fast


def wait_for_rows(workdir, processes):
    while not writer.read_rows(workdir / "metrics.jsonl"):
        assert processes[0].poll() is None
        time.sleep(0.02)


def test_who_is_missing_is_named_in_one_line(tmp_path):
    arguments = hosts.train_arguments(tmp_path / "run")
    (code,), (output,), (error,) = hosts.ended(
        hosts.start(*arguments, "--initialization_timeout", 1, numbers=(0,))
    )
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert "1 of 2 processes did not come within 1 seconds: process 1;" in error
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_told_to_stop_one_stops_all_and_the_restart_is_as_one_process(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    more = ("training.num_train_steps=40", "training.checkpoint_every=100")
    arguments = hosts.train_arguments(workdir, *more, **SMALL)
    processes = hosts.start(*arguments, devices=1)
    wait_for_rows(workdir, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs, errors = hosts.ended(processes)
    assert codes == [75, 75], errors
    assert f"stopped and saved: {workdir}" in outputs[0] and "stopped" not in outputs[1]
    hosts.run(*arguments, devices=1)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:2])
    whole = build.load_config("digits:base", (*tiny.unrefined("base"), *more))
    assert training.train(whole, tmp_path / "whole")
    hosts.assert_same_rows(hosts.rows(workdir), hosts.rows(tmp_path / "whole"))


@pytest.fixture
def photographs(tmp_path):
    """Twenty images of each of two classes, and what makes a run train on them without an end."""
    rng = np.random.default_rng(0)
    for number in range(40):
        folder = tmp_path / "photographs" / "train" / f"class_{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    overrides = (
        "data.name=folder",
        f"data.directory={tmp_path / 'photographs'}",
        "data.num_channels=3",
        "data.num_classes=2",
        "training.num_train_steps=1000000",
        "training.checkpoint_every=1000000",
    )
    return tmp_path / "photographs" / "train" / "class_0" / "0.png", overrides


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 1000])  # in the middle of a save, as a rule, and between two
def test_of_those_that_lost_another_all_ask_to_be_started_again(every, tmp_path):
    workdir = tmp_path / "run"
    more = ("training.num_train_steps=100000", f"training.checkpoint_every={every}")
    arguments = hosts.train_arguments(workdir, *more, **SMALL)
    processes = hosts.start(*arguments, count=4, devices=1)
    wait_for_rows(workdir, processes)
    processes[1].send_signal(signal.SIGKILL)
    codes, _, errors = hosts.ended(processes)
    assert codes[1] == -signal.SIGKILL
    # 134 is also what jax ends with where it hears of it first: by SIGABRT, says the system.
    assert {codes[0], *codes[2:]} <= {134, -signal.SIGABRT}, errors
    assert "free space" not in "".join(errors)


@pytest.mark.slow
def test_a_folder_that_hosts_do_not_share_is_refused(tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    arguments = hosts.train_arguments("run", **SMALL)
    codes, _, errors = hosts.ended(hosts.start(*arguments, devices=1, folders=folders))
    assert codes == [2, 2]
    assert "run is not one folder for all hosts: what process 0 writes there is" in errors[0]
    assert not (tmp_path / "a" / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_what_one_fails_of_all_say_and_end_with(photographs, tmp_path):
    """Each reads its own rows: of an image that becomes damaged one of the two learns first."""
    image, overrides = photographs
    arguments = hosts.train_arguments(tmp_path / "run", *overrides, **SMALL)
    processes = hosts.start(*arguments, devices=1)
    wait_for_rows(tmp_path / "run", processes)
    image.write_bytes(b"")
    began = time.monotonic()
    codes, _, errors = hosts.ended(processes)
    assert time.monotonic() - began < 60
    assert codes == [2, 2], errors
    for error in errors:
        (line,) = [x for x in error.splitlines() if "arcond train: " in x]
        assert f"{image} cannot be read as an image" in line and "Traceback" not in error


@pytest.mark.slow
def test_of_one_that_hangs_all_show_where_and_end(photographs, tmp_path):
    """One reads for ever, from a pipe that nobody writes to; the other waits for it."""
    image, overrides = photographs
    arguments = hosts.train_arguments(tmp_path / "run", *overrides, **SMALL)
    processes = hosts.start(*arguments, "--stall_minutes", 0.1, devices=1)
    wait_for_rows(tmp_path / "run", processes)
    os.mkfifo(image.with_name("pipe"))
    image.with_name("pipe").rename(image)
    codes, _, errors = hosts.ended(processes)
    assert codes == [124, 124], errors
    assert all("nothing ended for 0.1 minutes" in error for error in errors)
    assert any("in open_square" in error for error in errors)


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path, monkeypatch):
    """Through the script of `launch/`, with four devices each."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(program(tmp_path)), os.environ["PATH"]]))
    images, cards, scores = {}, {}, {}
    for count in (1, 2):
        workdir, npz = tmp_path / f"{count}", tmp_path / f"{count}.npz"
        sample = ["sample", "--checkpoint", workdir, "--num_images", 16, "--out", npz]
        calibrate = ["calibrate", "--checkpoint", workdir]
        compare = ["compare", "--checkpoint", workdir, "--num_seeds", 2, "--per_class", 2]
        compare += ["--system", "plain", "transport.kind=none", "--system", "refined"]
        for command in (hosts.train_arguments(workdir), calibrate, sample, compare):
            how = ["--processes", count, "--devices", 8 // count, "--port", hosts.free_port()]
            words = ["bash", SCRIPT, *how, "--logs", tmp_path / "logs", "--", *command]
            done = subprocess.run(
                list(map(str, words)), capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
        images[count] = np.load(npz)["arr_0"].astype(np.int32)
        hosts.run("evaluate", "--samples", npz, "--checkpoint", workdir, count=1)
        cards[count] = numbers(json.loads(npz.with_suffix(".card.json").read_text()))
        scores[count] = numbers(json.loads((workdir / "comparison.json").read_text()))
        given = ["--samples", tmp_path / "1.npz", "--reference", npz, "--allow_singular"]
        out = tmp_path / f"{count}.scores.json"
        arguments = ["evaluate", "--checkpoint", tmp_path / "1", *given, "--out", out]
        measured = [
            hosts.run(*arguments, count=n) and numbers(json.loads(out.read_text())) for n in (1, 2)
        ]
        np.testing.assert_allclose(measured[1], measured[0], rtol=1e-12, atol=1e-12)
    assert len(cards[1]) > 5 and len(scores[1]) > 20
    # A level of a pixel here and there.
    np.testing.assert_allclose(cards[2], cards[1], rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(scores[2], scores[1], rtol=1e-2, atol=1e-2)
    hosts.assert_same_rows(hosts.rows(tmp_path / "2"), hosts.rows(tmp_path / "1"))
    assert np.abs(images[1] - images[2]).max() <= 1


def numbers(tree):
    """All of a JSON document but those of time, in its order."""
    if isinstance(tree, dict):
        timed = ("milliseconds_per_image", "refinement_share_of_time")
        return [x for name, value in tree.items() if name not in timed for x in numbers(value)]
    if isinstance(tree, list):
        return [x for value in tree for x in numbers(value)]
    return [float(tree)] if isinstance(tree, (int, float)) else []


def program(folder):
    """A folder that holds `arcond`, of this checkout."""
    path = folder / "bin" / "arcond"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m arcond_jax "$@"\n')
    path.chmod(0o755)
    return path.parent


@pytest.mark.slow
def test_with_latents_and_a_bank_the_restart_is_the_same(tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    hosts.run(*hosts.train_arguments(whole))
    shutil.copytree(whole, workdir)
    for step in (4, 6):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    hosts.run(*hosts.train_arguments(workdir))
    assert hosts.rows(workdir) == hosts.rows(whole)
