"""A process that hangs shows where and ends; one that compiles is left alone."""

import subprocess
import sys

import pytest

PROCESS = """
import time

from arcond_jax.parallel import stalling

stalling.TOGETHER = 0.0


def forever():
    time.sleep(60)


def a_moment():
    time.sleep(0.4)


with stalling.watched({minutes}):
    {block}
print("done")
"""


def run(block, minutes=0.2 / 60):
    code = PROCESS.format(minutes=minutes, block=block.replace("\n", "\n    "))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_one_that_hangs_shows_where_and_ends():
    code, output, error = run("stalling.ended()\nforever()")
    assert (code, output) == (124, "")
    assert error.startswith("arcond: nothing ended for 0.0033") and "in forever" in error


def test_after_longer_the_limit_is_as_before():
    block = "with stalling.longer():\n    a_moment()\nforever()"
    assert run(block)[0] == 124


@pytest.mark.parametrize(
    ("block", "minutes"),
    [
        ("a_moment()", 0.2 / 60),  # nothing ended yet: it compiles
        (
            "stalling.ended()\nwith stalling.longer():\n    stalling.ended()\n    a_moment()",
            0.2 / 60,
        ),
        ("stalling.ended()\na_moment()", None),
    ],
)
def test_one_that_compiles_or_goes_on_is_left_alone(block, minutes):
    assert run(block, minutes) == (0, "done\n", "")


def test_after_the_block_nothing_is_watched():
    assert run("stalling.ended()\nimport atexit\natexit.register(a_moment)")[0] == 0
