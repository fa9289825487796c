"""The checks before a run, as two processes on CPUs."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    kept = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    both = {**kept, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    both["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "launch/preflight.py", "--devices", "4"),
                *("--bucket", tmp_path / "a bucket", "--data", data),
            ],
            cwd=ROOT,
            env={**both, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, data in enumerate((ROOT / "configs", tmp_path / "nowhere"))
    ]
    (first, _), (second, wrong) = (process.communicate(timeout=60) for process in processes)
    assert [process.returncode for process in processes] == [0, 2]
    # Gloo of jaxlib speaks on stdout as well.
    fine = [line.removeprefix("ok").strip() for line in first.splitlines() if line[:2] == "ok"]
    names = [line.split(":")[0] for line in fine]
    checks = ["processes", "devices", "psum", "clock", "same versions", "versions", "memory"]
    assert names == [*checks[:4], "shared", *checks[4:], "bucket", "data"]
    assert "devices: 4 of cpu, 2 here" in fine
    assert "ok" not in second
    (failed,) = [line for line in wrong.splitlines() if line.startswith("FAILED")]
    assert failed.endswith(f"{tmp_path}/nowhere does not exist, or this host may not read it")
    assert list((tmp_path / "a bucket").iterdir()) == []


def test_some_of_the_variables_are_not_enough():
    done = subprocess.run(
        [sys.executable, "launch/preflight.py"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_PROCESS_ID": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--coordinator_address and --num_processes must be given too" in done.stderr
