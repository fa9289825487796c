"""One training run in a working directory at a time, and one that draws a file.

On a file system the kernel holds the lock of a process, and lets go of it when the process ends in
whatever way: no lock is ever stale. In a bucket there are no locks. There a file says whose the
directory is, and changes as long as its run lives; one that does not change is of a run that died.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from arcond_jax import atomic, build, caches, digest
from arcond_jax.evaluation import part
from arcond_jax.parallel import processes
from arcond_jax.training import stopping

BEAT = 20.0  # seconds between two changes of the file in a bucket
DEAD = 3 * BEAT  # without a change; clocks of machines are not compared
SETTLED = 3.0  # seconds until of two runs that start at once one sees the other
LOCK, TOKEN = ".lock", ".shared"
SHARED = 60.0  # seconds until all see what one host writes; NFS may remember a folder so long


@contextlib.contextmanager
def only_run(workdir: epath.Path) -> Iterator[None]:
    """Holds a working directory against a second run; of several processes the first does.

    In a bucket a run whose predecessor was killed waits for `DEAD` seconds before it goes on.

    Raises:
      build.ConfigError: Another run is training there, nothing can be written there, or it is not
        the same one for all processes.
    """
    with contextlib.ExitStack() as stack:
        if processes.is_first():
            in_bucket = "://" in str(workdir)
            stack.enter_context(_in_bucket(workdir) if in_bucket else _on_disk(workdir))
        check_shared(workdir)
        yield


def check_shared(folder: epath.Path) -> None:
    """Returns at once if all processes see what the first writes in a folder; all have to ask.

    Raises:
      build.ConfigError: One does not, or nothing can be written there; in all of them.
    """
    if not processes.are_several():
        return
    path = folder / TOKEN

    def write() -> np.ndarray:
        token = np.frombuffer(os.urandom(16), np.uint32)
        with contextlib.suppress(OSError):  # or the others would wait; it is seen by none then
            folder.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, token.tobytes().hex())
        return token

    token = processes.from_first(write, jax.ShapeDtypeStruct((4,), np.uint32))
    wanted, deadline, seen = np.asarray(token).tobytes().hex(), time.monotonic() + SHARED, False
    while not seen and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            seen = path.read_text() == wanted
        if not seen:
            time.sleep(0.2)
    each = processes.each({"seen": np.asarray([seen], np.uint32)})
    blind = [str(number) for number, there in enumerate(each) if not there["seen"][0]]
    if processes.is_first():
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    if blind:
        raise build.ConfigError(
            f"{folder} is not one folder for all hosts: what process 0 writes there is not seen "
            f"by process {', '.join(blind)}; use a file system that they share, or a bucket"
        )


@contextlib.contextmanager
def only_drawing(path: str | os.PathLike) -> Iterator[None]:
    """Holds a file of samples or a sweep against a second run; of several processes the first.

    The lock lies in the user's caches, so that nothing is left beside it; of two users or machines
    whose caches are not the same one does not see the other.

    Raises:
      build.ConfigError: Another run is drawing it.
    """
    if not processes.is_first():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            folder = caches.folder("drawing")
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{digest.of_json(str(part.path_of(path)))[:16]}.lock"
            holder = stack.enter_context(_locked(folder / name))
        except (OSError, RuntimeError) as error:  # no home, or a full one
            logging.warning("%s cannot be locked against a second run: %s", path, error)
            holder = None
        if holder is not None:
            raise build.ConfigError(
                f"another run is drawing {path} ({holder}): wait for its end, stop it, or name "
                "another"
            )
        yield


def _refused(workdir: epath.Path, holder: str) -> build.ConfigError:
    return build.ConfigError(
        f"another run is training in {workdir} ({holder}): wait for its end, stop it, or use "
        "another workdir"
    )


@contextlib.contextmanager
def _on_disk(workdir: epath.Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            holder = stack.enter_context(_locked(workdir / LOCK))
        except OSError as error:
            raise build.ConfigError(
                f"Cannot write to {workdir} ({error.strerror}): use another workdir"
            ) from None
        if holder is not None:
            raise _refused(workdir, holder)
        yield


@contextlib.contextmanager
def _locked(path: os.PathLike) -> Iterator[str | None]:
    """Gives the other holder of a lock, or None and the lock itself for as long as it is open."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # over NFS a lock needs writing
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield os.read(descriptor, 1000).decode(errors="replace")
            return
        except OSError as error:
            logging.warning("%s cannot be locked against a second run: %s", path, error.strerror)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _me().encode(), 0)
        yield None
    finally:
        os.close(descriptor)


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextlib.contextmanager
def _in_bucket(workdir: epath.Path) -> Iterator[None]:
    lock, ours = workdir / LOCK, {"holder": _me(), "id": uuid.uuid4().hex}
    _wait_while_silent(workdir, lock)
    atomic.write_text(lock, json.dumps(ours | {"beat": 0}))
    time.sleep(SETTLED)
    other = _read(lock)
    if other.get("id") != ours["id"]:
        raise _refused(workdir, other.get("holder", "unknown"))
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(lock, ours, over), name="lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()
        lock.unlink(missing_ok=True)


def _wait_while_silent(workdir: epath.Path, lock: epath.Path) -> None:
    """Returns when there is no lock, or one of a run that died."""
    found = _read(lock)
    if found:
        holder = found.get("holder", "unknown")
        logging.info("%s: waiting %.0f s whether its run (%s) lives", workdir, DEAD, holder)
    deadline = time.monotonic() + DEAD
    while found and time.monotonic() < deadline:
        time.sleep(BEAT / 10)
        now = _read(lock)
        if now and now != found:
            raise _refused(workdir, now.get("holder", "unknown"))
        found = now


def _beat(lock: epath.Path, ours: dict[str, str], over: threading.Event) -> None:
    beat = 0
    while not over.wait(BEAT):
        beat += 1
        with contextlib.suppress(OSError):  # the next one may be written
            other = _read(lock)
            if other and other.get("id") != ours["id"]:  # this process stood still for so long
                holder = other.get("holder", "unknown")
                stopping.say(f"arcond: another run took over ({holder}): ending\n")
                os._exit(2)
            atomic.write_text(lock, json.dumps(ours | {"beat": beat}))


def _read(lock: epath.Path) -> dict[str, Any]:
    """What the file says; nothing where there is none."""
    try:
        found = json.loads(lock.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        return {"id": None}
    return found if isinstance(found, dict) else {"id": None}
