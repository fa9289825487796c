"""How commands fail: one line and an exit code; the unforeseen keeps its traceback in a file."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from arcond_jax import build, checkpoint
from arcond_jax.cli import failing
from arcond_jax.parallel import processes


def raised(error):
    def run():
        raise error

    return run


def line_of(capsys):
    error = capsys.readouterr().err
    assert error.startswith("arcond sample: ") and error.count("\n") == 1
    return error


def test_a_refusal_is_one_line(capsys):
    assert failing.guarded("sample", raised(build.ConfigError("one\ntwo")))[0] == 2
    assert line_of(capsys) == "arcond sample: one two\n"


def test_who_is_gone_is_no_fault_of_the_others(capsys, monkeypatch):
    def run():
        try:
            raise ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
        except ValueError as error:
            raise checkpoint.CheckpointError("Writing failed: free space") from error

    assert failing.guarded("sample", run)[0] == failing.REFUSED  # one process has no others
    capsys.readouterr()
    monkeypatch.setattr(processes, "are_several", lambda: True)
    assert failing.guarded("sample", run)[0] == failing.LOST
    assert "another process is gone, start all again (UNKNOWN: Gloo" in line_of(capsys)


def test_what_a_library_raises_is_unforeseen_and_what_we_raise_is_not(capsys):
    def ours():
        build.with_overrides(build.load_config("digits:base"), ["seed=-1"])

    assert failing.guarded("sample", ours)[0] == 2
    assert "seed -1 must be" in line_of(capsys)
    assert failing.guarded("sample", lambda: np.zeros(3).reshape(2, 2))[0] == 1
    message = line_of(capsys)
    log = pathlib.Path(re.search(r"traceback is in (\S+\.log)", message)[1])
    assert "unforeseen ValueError: cannot reshape" in message
    assert log.read_text().startswith("Traceback")
    log.unlink()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"), 2, "out of memory"),
        (RuntimeError("Unable to initialize backend 'gpu'"), 2, "JAX_PLATFORMS="),
        (checkpoint.CheckpointError("RESOURCE_EXHAUSTED: disk"), 2, "sample: RESOURCE_EXHAUSTED"),
        (FileNotFoundError(2, "No such file", "x.npz"), 2, "x.npz"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_known_causes(error, code, message, capsys):
    assert failing.guarded("sample", raised(error))[0] == code
    assert message in line_of(capsys)


# Says when it is ready and then, like XLA as it compiles, gives Python's main thread nothing to do.
BUSY = """
import ctypes, pathlib, sys
from arcond_jax import atomic
from arcond_jax.cli import leaving

leaving.on_signals()
with atomic.file(sys.argv[1] + "/a.npz") as opened, atomic.folder(sys.argv[1] + "/b") as folder:
    opened.write(b"half")
    (folder / "0.png").touch()
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(30)
"""


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGINT, "arcond: interrupted\n"),
        (signal.SIGTERM, "arcond: ended by SIGTERM\n"),
        (signal.SIGHUP, "arcond: ended by SIGHUP\n"),
    ],
)
def test_a_signal_ends_a_command_at_once_and_leaves_nothing(number, line, tmp_path):
    # The tests themselves may run under nohup.
    program = f"import signal; signal.signal({int(number)}, signal.SIG_DFL)\n{BUSY}"
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        assert len(os.listdir(tmp_path)) == 2
        process.send_signal(number)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (128 + number, line)
    assert os.listdir(tmp_path) == []


def test_a_signal_at_the_very_start_does_not_hang():
    program = (
        "import signal, threading; from arcond_jax.cli import leaving\n"
        "start = threading.Thread.start\n"
        "def signalled(thread): signal.raise_signal(signal.SIGTERM); start(thread)\n"
        "threading.Thread.start = signalled\n"
        "leaving.on_signals()"
    )
    made = subprocess.run([sys.executable, "-c", program], timeout=20, check=False)
    assert made.returncode == -signal.SIGTERM


def test_a_reader_that_never_reads_holds_no_one():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, bytes(4096)):
            pass
    os.set_blocking(writing, True)
    command = [sys.executable, "-c", TRAINING, "saved", "30"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=writing) as process:
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
            time.sleep(0.1)
        assert process.wait(timeout=5) == 130
    os.close(reading), os.close(writing)


# Trains, and is in XLA for a while: other threads take the signals.
TRAINING = """
import ctypes, signal, sys
from arcond_jax.cli import leaving
from arcond_jax.training import stopping

signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background
leaving.on_signals()
with stopping.Stop() as stop:
    stop.unsaved = sys.argv[1] == "unsaved"
    signal.pthread_sigmask(signal.SIG_BLOCK, leaving.SIGNALS)
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(int(sys.argv[2]))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, leaving.SIGNALS)
    print("saved", bool(stop))
"""


@pytest.mark.parametrize("unsaved", [True, False])
def test_training_says_at_once_that_a_signal_came_and_loses_nothing_by_a_second(unsaved):
    seconds = "2" if unsaved else "30"
    arguments = ["unsaved" if unsaved else "saved", seconds]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", TRAINING, *arguments]
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        line = process.stderr.readline()
        assert time.monotonic() - start < 1.5
        assert line.startswith("arcond: SIGTERM: will stop after this step and save it")
        assert ("Ctrl-C ends it at once" in line) != unsaved
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            process.send_signal(number)
            time.sleep(0.1)
        output, error = process.communicate(timeout=20)
    if unsaved:
        assert (process.returncode, output, error) == (0, "saved True\n", "")
    else:
        assert (process.returncode, output, error) == (130, "", "arcond: interrupted\n")


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + BUSY.replace(
        "ctypes.CDLL(None).sleep(30)", "signal.raise_signal(signal.SIGHUP)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b"]


def test_a_reader_that_goes_away_is_no_fault(capsys):
    broken = os.dup(1)
    try:
        assert failing.guarded("config", raised(BrokenPipeError(32, "Broken pipe")))[0] == 141
    finally:
        os.dup2(broken, 1)
    assert capsys.readouterr().err == ""


def test_an_output_that_takes_nothing_is_named():
    with open("/dev/full", "w") as full:
        made = subprocess.run(
            [sys.executable, "-m", "arcond_jax", "config", "--config", "digits:ar"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert made.returncode == 2
    assert made.stderr == (
        "arcond config: standard output cannot be written: No space left on device; what it has is "
        "not whole\n"
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        pytest.param("JAX_ENABLE_X64", "banana", marks=pytest.mark.slow),
        ("JAX_PLATFORMS", "cuda"),
        pytest.param("JAX_PLATFORMS", "banana", marks=pytest.mark.slow),
    ],
)
def test_a_variable_that_jax_cannot_use_is_named(variable, value, tmp_path):
    arguments = ["train", "--config", "digits:ar", "--workdir", str(tmp_path / "run")]
    made = subprocess.run(
        [sys.executable, "-m", "arcond_jax", *arguments],
        env={**os.environ, variable: value},
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = made.stderr.splitlines()
    assert made.returncode == 2 and variable in line
    assert os.listdir(tmp_path) == []
