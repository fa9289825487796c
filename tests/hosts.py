"""Programs as several processes of this machine, each with its part of the devices."""

import os
import re
import socket
import subprocess
import sys

import numpy as np
import tiny

from arcond_jax.training import rates, writer

SECONDS = 900


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start(
    *arguments, program=("-m", "arcond_jax"), count=2, devices=None, numbers=None, folders=None
):
    """The processes of one program.

    Args:
      program: What Python runs; by default a command.
      count: How many there are.
      devices: CPU devices of each; None for its part of eight.
      numbers: Those that are started; None for all.
      folders: In which each runs; None for this one.
    """
    flag = f"--xla_force_host_platform_device_count={devices or 8 // count}"
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", flag, os.environ["XLA_FLAGS"])
    address = f"127.0.0.1:{free_port()}"
    there = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            cwd=None if folders is None else folders[number],
            env={**os.environ, "XLA_FLAGS": flags, **there, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (range(count) if numbers is None else numbers)
    ]


def ended(processes):
    """Exit codes, outputs and errors."""
    said = [process.communicate(timeout=SECONDS) for process in processes]
    return [process.returncode for process in processes], *zip(*said, strict=True)


def run(*arguments, **how):
    """Runs a command to its end, which must be a good one."""
    codes, outputs, errors = ended(start(*arguments, **how))
    assert set(codes) == {0}, errors
    return outputs


def train_arguments(workdir, *more, variant="joint", overrides=tiny.overrides):
    flags = (f"--config.{override}" for override in (*overrides(variant), *more))
    return ["train", "--config", f"digits:{variant}", "--workdir", workdir, *flags]


def rows(workdir):
    """What was logged, but for how fast it went; each step once."""
    read = writer.read_rows(workdir / "metrics.jsonl")
    found = [{name: x for name, x in row.items() if name not in rates.NAMES} for row in read]
    assert len({row["step"] for row in found}) == len(found)
    return found


def assert_same_rows(found, wanted):
    """Sums run in another order: a few float32 roundings (1.2e-7) apart."""
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=3e-5, atol=1e-6)
