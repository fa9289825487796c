"""kill -9 of either of two processes, at any moment: what was saved goes on as if never stopped."""

import random
import signal
import time

import hosts
import jax
import numpy as np
import pytest

from arcond_jax import checkpoint
from arcond_jax.parallel import processes
from arcond_jax.run import restoring
from arcond_jax.training import writer

KILLS = 20
SMALL = dict(variant="base")  # codes alone: compiles fast


def last_row(workdir):
    found = writer.read_rows(workdir / "metrics.jsonl")
    return found[-1]["step"] if found else 0


def last_saved(workdir):
    """The step of the last checkpoint that is whole; 0 if there is none."""
    folder = f"{workdir}/checkpoints"
    if not checkpoint.has_steps(folder):
        return 0
    with checkpoint.Checkpoints(folder) as checkpoints:
        return checkpoints.latest_step()


def killed(workdir, arguments, rng):
    """Starts both, kills one: some time after the start, or after the first new row."""
    before = last_row(workdir)
    both = hosts.start(*arguments, devices=1)
    if rng.random() < 0.75:
        while last_row(workdir) in (0, before) and both[0].poll() is None:
            time.sleep(0.02)
    time.sleep(rng.uniform(0, 3))
    assert [x.poll() for x in both] == [None, None], hosts.ended(both)
    victim = rng.randrange(2)
    both[victim].kill()
    began = time.monotonic()
    codes, _, errors = hosts.ended(both)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, 75), errors
    return time.monotonic() - began


@pytest.mark.slow
def test_twenty_times(tmp_path):
    rng, workdir, waits = random.Random(0), tmp_path / "run", []
    endless = ("training.checkpoints_kept=3", "training.num_train_steps=1000000")
    for number in range(KILLS):
        arguments = hosts.train_arguments(workdir, *endless, **SMALL)
        # Before jax joins them nobody hears of one that is gone: the other waits, and names it.
        waits.append(killed(workdir, [*arguments, "--initialization_timeout", 20], rng))
        print(f"kill {number}: the other ended in {waits[-1]:.1f} s, saved: {last_saved(workdir)}")
    total = last_saved(workdir) + 4
    more = ("training.checkpoints_kept=3", f"training.num_train_steps={total}")
    hosts.run(*hosts.train_arguments(workdir, *more, **SMALL), devices=1)
    whole = (*more, "training.checkpoint_every=1000000")
    hosts.run(*hosts.train_arguments(tmp_path / "whole", *whole, **SMALL), devices=1)
    assert hosts.rows(workdir) == hosts.rows(tmp_path / "whole")
    params = [restoring.restore(x).params for x in (workdir, tmp_path / "whole")]
    jax.tree.map(np.testing.assert_array_equal, *map(processes.fetch, params))
    print(f"{KILLS} kills, {total} steps; the other ended within {max(waits):.1f} s")
