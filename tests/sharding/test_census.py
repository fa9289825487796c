"""The roll call of processes, held between threads."""

import concurrent.futures
import socket
import time

import pytest

from arcond_jax.parallel import census


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def held(*abouts, count=None, numbers=None, timeout=20.0):
    """What each process is told: "" to go on, or why not."""
    address, count = f"127.0.0.1:{free_port()}", count or len(abouts)
    numbers = numbers or range(len(abouts))

    def one(number, about):
        place = census.Place(address, count, number)
        try:
            census.hold(place, about, host=f"host{number}", timeout=timeout)
        except census.CensusError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(one, numbers, abouts))


SAME = {"jax": "0.10.2", "config": ["model.width=64", "seed=0"]}


def test_all_there_and_the_same_go_on():
    assert held(SAME, SAME, SAME) == ["", "", ""]


def test_who_is_missing_is_named_to_all():
    first, second = held(SAME, SAME, count=4, timeout=1.0)
    assert first == second
    assert "2 of 4 processes did not come within 1 seconds: process 2, 3" in first


def test_another_version_is_named_and_another_config():
    first, second = held(SAME, SAME | {"jax": "0.9.1"})
    assert first == second
    assert first.startswith("process 1 on host1 has another jax than process 0 on host0 (0.9.1, ")
    first, second = held(SAME, SAME | {"config": ["model.width=64", "seed=1"]})
    assert first == second
    assert "has another config than process 0 on host0 (seed=1, not seed=0): all must" in first
    first, _ = held(SAME, SAME | {"config": ["model.width=64"]})
    assert "(nothing, not seed=0)" in first


@pytest.mark.parametrize(
    ("theirs", "ours", "found", "expected"),
    [
        (["--n", "8", "--seed", "8"], ["--n", "8", "--seed", "0"], "--seed 8", "--seed 0"),
        (["--n=8", "--fast"], ["--n=8"], "--fast", "nothing"),
        (["b", "a"], ["a", "b"], "nothing", "a"),
        (["x" * 200 + "a"], ["x" * 200 + "b"], "x" * 60 + "a", "x" * 60 + "b"),
        (["y" * 200], [], "y" * census.SHOWN, "nothing"),
        (
            [f"{i}.png" for i in range(20_000)] + ["a"],
            [f"{i}.png" for i in range(20_000)],
            "a",
            "no",
        ),
    ],
)
def test_the_words_that_differ_are_shown(theirs, ours, found, expected):
    told, _ = held({"command": ours}, {"command": theirs})
    assert f"({found}, not {expected}" in told


def test_one_number_for_two():
    told = held(SAME, SAME, SAME, count=3, numbers=(0, 1, 1))
    assert any("both host1 and host1 say they are process 1" in x for x in told)


def test_without_process_0_a_line():
    (told,) = held(SAME, count=2, numbers=(1,), timeout=0.5)
    assert told.startswith("process 1 on host1 has no answer from process 0 at 127.0.0.1:")


def test_strangers_and_those_who_come_again_are_no_matter():
    address = f"127.0.0.1:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        place = census.Place(address, 2, 0)
        first = pool.submit(census.hold, place, SAME, host="host0", timeout=20.0)
        for line in (b"GET / HTTP/1.1\n", b'{"process": 1, "host": "host1", "number', b"[]\n"):
            _say(address, line)
        place = census.Place(address, 2, 1)
        census.hold(place, SAME, host="host1", timeout=20.0)
        first.result(timeout=20.0)


def _say(address, line):
    host, port = address.split(":")
    for _ in range(50):
        try:
            with socket.create_connection((host, int(port))) as opened:
                opened.sendall(line)
            return
        except ConnectionRefusedError:
            time.sleep(0.1)


def test_places(monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    for name in census.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    assert census.place(None, None, None, timeout=1) is None
    assert census.place("a:1", 1, 0, timeout=1) is None
    assert census.place("a:1", 2, 1, timeout=1) == census.Place("a:1", 2, 1)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "b:2")
    with pytest.raises(census.CensusError, match="--num_processes and --process_id must be given"):
        census.place(None, None, None, timeout=1)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert census.place(None, None, None, timeout=1) == census.Place("b:2", 2, 1)
    with pytest.raises(census.CensusError, match="--process_id 2 must be from 0"):
        census.place(None, None, 2, timeout=1)
    for address in ("b", "b:0", "b:99999", "http://b:2", "::1:2"):
        with pytest.raises(census.CensusError, match="must be HOST:PORT"):
            census.place(address, None, None, timeout=1)
    assert census.place("[::1]:2", 2, 0, timeout=1) == census.Place("[::1]:2", 2, 0)
    with pytest.raises(census.CensusError, match="--num_processes 0 must be at least 1"):
        census.place(None, 0, None, timeout=1)


def test_slurm_is_asked_where_it_launched(monkeypatch):
    there = {"JOB_ID": "7", "STEP_NODELIST": "n[01-02]", "NTASKS": "2", "PROCID": "1"}
    for name, value in (there | {"LOCALID": "0"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = census.place(None, None, None, timeout=1)
    assert (found.num_processes, found.process_id) == (2, 1)
    assert found.coordinator_address.startswith("n01:")
