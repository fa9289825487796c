"""Which processes are to be one program, and a roll call before jax joins them.

jax waits for them in C++ and ends every process with a stack when one does not come, so that nobody
learns which. Here each says over TCP who it is, to the coordinator at the port that jax takes next,
and all have one answer: go on, or why not. It is known which process is missing, and that all run
the same versions, command and config.
"""

import asyncio
import contextlib
import dataclasses
import difflib
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import clusters  # jax has no public name for what it detects
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

# Of the launchers that jax knows; without one of them, and without a TPU, nothing is looked for.
LAUNCHERS = (
    "OMPI_MCA_orte_hnp_uri",
    "SLURM_STEP_NODELIST",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "JOB_COMPLETION_INDEX",
)
RETRY = 0.2  # seconds
SHOWN = 120  # characters of what differs
LONGEST = 2**22  # bytes of a hello
HELLO = 10.0  # seconds that whoever connects has for it, and an answer on its way

# Of one process; all but "process" and "host" are to be the same.
Hello = dict[str, Any]


class CensusError(ValueError):
    """Processes that cannot be one program; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among those of a program, as `jax.distributed.initialize` is told of it."""

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


def place(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    timeout: int,
) -> Place | None:
    """The place of this process; None where it is alone.

    What is None is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and
    then asked of the TPU, Slurm, Open MPI or Kubernetes as far as they launched this process.

    Raises:
      CensusError: Some of it is known and some not, or it cannot be.
    """
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    count = _given("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    number = _given("JAX_PROCESS_ID") if process_id is None else process_id
    local = None
    known = None not in (address, count, number)
    if not known and (running_in_cloud_tpu_vm or any(x in os.environ for x in LAUNCHERS)):
        try:
            address, count, number, local = (
                clusters.ClusterEnv.auto_detect_unset_distributed_params(
                    address, count, number, None, None, timeout
                )
            )
        except Exception as error:  # of any launcher
            why = " ".join(str(error).split())[:200]
            raise CensusError(
                f"the other processes cannot be found out ({why}): give --coordinator_address, "
                "--num_processes and --process_id"
            ) from error
    if count == 1 or (address is None and count is None and number is None):
        return None
    if address is None or count is None or number is None:
        flags = {"coordinator_address": address, "num_processes": count, "process_id": number}
        missing = " and ".join(f"--{name}" for name, value in flags.items() if value is None)
        raise CensusError(
            f"{missing} must be given too: all three, as flags or as JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    if count < 1:
        raise CensusError(f"--num_processes {count} must be at least 1")
    if not 0 <= number < count:
        raise CensusError(f"--process_id {number} must be from 0 to --num_processes {count} - 1")
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or (not bracketed and {":", "/"} & {*host}) or not _is_port(port):
        raise CensusError(
            f"--coordinator_address {address} must be HOST:PORT or [IPv6]:PORT, of process 0, "
            "PORT from 1 to 65535"
        )
    return Place(address, count, number, None if local is None else tuple(local))


def _given(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise CensusError(f"{variable}={text} must be a whole number, at least 0")
    return int(text)


def initialize(place: Place, **options: Any) -> None:
    """Has jax join processes that were called, by what is known of their places alone."""
    jax.distributed.initialize(
        place.coordinator_address,
        place.num_processes,
        place.process_id,
        place.local_device_ids,
        cluster_detection_method="deactivate",
        **options,
    )


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) < 2**16


def hold(place: Place, about: Mapping[str, str | list[str]], *, host: str, timeout: float) -> None:
    """Returns once all processes are there and are the same.

    Args:
      about: What must be the same of all, by the name that a message calls it; of a list the
        message shows the parts that differ.
      host: Name of this machine, for messages.
      timeout: Seconds to wait for the others.

    Raises:
      CensusError: One is missing or differs; on every process that could be told.
    """
    hello: Hello = {"process": place.process_id, "host": host}
    hello |= {"number of processes": place.num_processes} | dict(about)
    role = _coordinate if place.process_id == 0 else _attend
    asyncio.run(role(place, hello, timeout))


async def _coordinate(place: Place, hello: Hello, timeout: float) -> None:
    present, answers = {0: hello}, {}
    decided, all_came, refusals = asyncio.Event(), asyncio.Event(), []
    # Connections that are cut off when all is said end in errors that asyncio would print.
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)

    async def heard(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            said = json.loads(await asyncio.wait_for(reader.readline(), HELLO))
            number = said["process"]
            refusal = _difference(hello, said) or _twice(present.get(number), said)
        except (OSError, ValueError, TypeError, KeyError, TimeoutError):  # a stranger
            writer.close()
            return
        if refusal:
            refusals.append(refusal)
        else:
            present[number] = said
        answers[writer] = number
        if 1 + len(answers) == place.num_processes:
            all_came.set()
        if refusal or len(present) == place.num_processes:
            decided.set()
        with contextlib.suppress(OSError):
            await reader.read()  # until it ends, perhaps to be started again
        if not decided.is_set():
            del present[number], answers[writer]

    port = int(place.coordinator_address.rpartition(":")[2])
    try:
        server = await asyncio.start_server(heard, port=port, limit=LONGEST)
    except OSError as error:
        raise CensusError(
            f"process 0 cannot listen at port {port} ({error.strerror}): end what does, or give "
            "another port in --coordinator_address to all processes"
        ) from error
    async with server:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(decided.wait(), timeout)
            if refusals:  # those who are about to come hear of it too
                await asyncio.wait_for(all_came.wait(), min(timeout, HELLO))
        missing = [str(i) for i in range(place.num_processes) if i not in present]
        if missing and not refusals:
            refusals.append(
                f"{len(missing)} of {place.num_processes} processes did not come within "
                f"{timeout:g} seconds: process {', '.join(missing)}; look at what they say, or "
                "wait longer with --initialization_timeout"
            )
        refusal = refusals[0] if refusals else ""
        for writer in list(answers):
            with contextlib.suppress(OSError):
                writer.write(json.dumps({"refusal": refusal}).encode() + b"\n")
                await asyncio.wait_for(writer.drain(), HELLO)
            writer.close()
    if refusal:
        raise CensusError(refusal)


async def _attend(place: Place, hello: Hello, timeout: float) -> None:
    host, _, port = place.coordinator_address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        left = max(0.0, deadline - time.monotonic()) + HELLO  # process 0 may have begun later
        writer = None
        try:
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(host.strip("[]"), int(port)), HELLO
            )
            writer.write(json.dumps(hello).encode() + b"\n")
            line = await asyncio.wait_for(reader.readline(), left)
            refusal = json.loads(line)["refusal"] if line else None
        except (OSError, TimeoutError):
            refusal = None
        except (ValueError, TypeError, KeyError):  # not our protocol: jax's, of a run that goes on
            refusal = (
                f"at {place.coordinator_address} something else answers: end what runs there, or "
                "give another port to all processes"
            )
        finally:
            if writer is not None:
                writer.close()
        if refusal:
            raise CensusError(refusal)
        if refusal == "":
            return
        if time.monotonic() > deadline:
            raise CensusError(
                f"process {place.process_id} on {hello['host']} has no answer from process 0 at "
                f"{place.coordinator_address} within {timeout:g} seconds: start it there, and let "
                "this host reach it"
            )
        await asyncio.sleep(RETRY)


def _difference(ours: Hello, theirs: Hello) -> str | None:
    """What to say of a process that is not the same as process 0; None if it is."""
    for name in ours:
        if name in ("process", "host") or theirs[name] == ours[name]:
            continue
        found, expected = _apart(theirs[name], ours[name])
        return (
            f"process {theirs['process']} on {theirs['host']} has another {name} than process 0 "
            f"on {ours['host']} ({found}, not {expected}): all must have the same"
        )
    if theirs["process"] not in range(ours["number of processes"]):
        return f"{theirs['host']} says it is process {theirs['process']}, which there is none of"
    return None


def _apart(theirs: Any, ours: Any) -> tuple[str, str]:
    """What one has and the other has not, in short."""
    first, second = str(theirs), str(ours)
    if isinstance(theirs, list) and isinstance(ours, list):
        matcher = difflib.SequenceMatcher(None, theirs, ours, autojunk=False)
        _, i, i_end, j, j_end = next(x for x in matcher.get_opcodes() if x[0] != "equal")
        before = theirs[i - 1] if i else ""
        flag = [before] if before.startswith("--") and "=" not in before else []
        first, second = " ".join(flag + theirs[i:i_end]), " ".join(flag + ours[j:j_end])
    same = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), 0)
    start = max(0, same - SHOWN // 2) if max(len(first), len(second)) > SHOWN else 0
    return first[start:][:SHOWN] or "nothing", second[start:][:SHOWN] or "nothing"


def _twice(present: Hello | None, said: Hello) -> str | None:
    if present is None:
        return None
    return (
        f"both {present['host']} and {said['host']} say they are process {said['process']}: give "
        "each its own --process_id"
    )
