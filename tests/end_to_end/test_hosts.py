"""Several processes as one program: the same numbers and files, one stop, one line for who is gone.

Two processes of four CPU devices each against one of eight.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny

from arcond_jax.training import rates, writer

SECONDS = 900


def start(*arguments, count=2, numbers=None):
    """The processes of one command; each has its part of eight devices."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{opened.getsockname()[1]}"
    flag = f"--xla_force_host_platform_device_count={8 // count}"
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", flag, os.environ["XLA_FLAGS"])
    there = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "arcond_jax", *map(str, arguments)],
            env={**os.environ, "XLA_FLAGS": flags, **there, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (range(count) if numbers is None else numbers)
    ]


def ended(processes):
    """Exit codes, and what each said."""
    said = [process.communicate(timeout=SECONDS) for process in processes]
    return [process.returncode for process in processes], said


def train_arguments(workdir, *more):
    overrides = (f"--config.{override}" for override in (*tiny.overrides(), *more))
    return ["train", "--config", "digits:joint", "--workdir", workdir, *overrides]


def rows(workdir):
    found = writer.read_rows(workdir / "metrics.jsonl")
    return [{name: x for name, x in row.items() if name not in rates.NAMES} for row in found]


def assert_same_rows(found, wanted):
    """Sums run in another order: a few float32 roundings (1.2e-7) apart."""
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=3e-5, atol=1e-6)


def test_who_is_missing_is_named_in_one_line(tmp_path):
    arguments = train_arguments(tmp_path / "run")
    (code,), ((output, error),) = ended(
        start(*arguments, "--initialization_timeout", 1, numbers=(0,))
    )
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert "1 of 2 processes did not come within 1 seconds: process 1;" in error
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    images = {}
    for count in (1, 2):
        workdir = tmp_path / f"{count}"
        npz = tmp_path / f"{count}.npz"
        sample = ["sample", "--checkpoint", workdir, "--num_images", 16, "--out", npz]
        calibrate = ["calibrate", "--checkpoint", workdir]
        for command in (train_arguments(workdir), calibrate, sample):
            codes, said = ended(start(*command, count=count))
            assert codes == [0] * count, said
        images[count] = np.load(npz)["arr_0"].astype(np.int32)
    scores = {}
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        given = ["--samples", tmp_path / "1.npz", "--reference", tmp_path / "2.npz"]
        arguments = ["evaluate", "--checkpoint", tmp_path / "1", *given, "--allow_singular"]
        codes, said = ended(start(*arguments, "--out", out, count=count))
        assert codes == [0] * count, said
        scores[count] = json.loads(out.read_text())["measurements"]
    assert scores[2] == pytest.approx(scores[1], rel=1e-12, abs=1e-12)
    assert_same_rows(rows(tmp_path / "2"), rows(tmp_path / "1"))
    assert np.abs(images[1] - images[2]).max() <= 1


@pytest.mark.slow
def test_told_to_stop_one_stops_all_and_the_restart_is_uninterrupted(tmp_path):
    codes, said = ended(start(*train_arguments(tmp_path / "whole")))
    assert codes == [0, 0], said
    workdir = tmp_path / "run"
    processes = start(*train_arguments(workdir))
    while not rows_or_none(workdir):
        assert processes[0].poll() is None
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = ended(processes)
    assert codes == [75, 75], said
    assert "stopped and saved" in said[0][0]
    codes, said = ended(start(*train_arguments(workdir)))
    assert codes == [0, 0], said
    assert rows(workdir) == rows(tmp_path / "whole")


def rows_or_none(workdir):
    return writer.read_rows(workdir / "metrics.jsonl")
