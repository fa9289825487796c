"""How commands fail: one line and an exit code; the unforeseen keeps its traceback in a file."""

import os
import pathlib
import re
import signal

import numpy as np
import pytest

from arcond_jax import build
from arcond_jax.cli import failing


def raised(error):
    def run():
        raise error

    return run


def line_of(capsys):
    error = capsys.readouterr().err
    assert error.startswith("arcond sample: ") and error.count("\n") == 1
    return error


def test_a_refusal_is_one_line(capsys):
    assert failing.guarded("sample", raised(build.ConfigError("one\ntwo"))) == 2
    assert line_of(capsys) == "arcond sample: one two\n"


def test_what_a_library_raises_is_unforeseen_and_what_we_raise_is_not(capsys):
    def ours():
        build.with_overrides(build.load_config("digits:base"), ["seed=-1"])

    assert failing.guarded("sample", ours) == 2
    assert "seed -1 must be" in line_of(capsys)
    assert failing.guarded("sample", lambda: np.zeros(3).reshape(2, 2)) == 1
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
        (FileNotFoundError(2, "No such file", "x.npz"), 2, "x.npz"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_known_causes(error, code, message, capsys):
    assert failing.guarded("sample", raised(error)) == code
    assert message in line_of(capsys)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_as_an_exception_does(number, tmp_path):
    temporary = tmp_path / "half"

    def run():
        temporary.touch()
        try:
            os.kill(os.getpid(), number)
        finally:
            temporary.unlink()

    with pytest.raises(SystemExit) as left:
        failing.guarded("sample", run)
    assert left.value.code == 128 + number
    assert not temporary.exists()
    assert signal.getsignal(number) is signal.SIG_DFL
