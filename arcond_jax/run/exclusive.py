"""One training run in a working directory at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

import jax
from etils import epath

from arcond_jax import build


@contextlib.contextmanager
def only_run(workdir: epath.Path) -> Iterator[None]:
    """Holds a local working directory against a second run, for as long as the process lives.

    In a bucket nothing is held: there are no locks there.

    Raises:
      build.ConfigError: Another run is writing there.
    """
    if "://" in str(workdir) or jax.process_index() != 0:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise build.ConfigError(
            f"Cannot write to {workdir} ({error.strerror}): use another workdir"
        ) from None
    descriptor = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise build.ConfigError(
                f"another run is training in {workdir}: wait for its end, stop it, or use another "
                "workdir"
            ) from None
        yield
    finally:
        os.close(descriptor)
