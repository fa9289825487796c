"""What XLA compiled stays in a folder of the user's, so that a second start need not compile it.

The folder is `arcond_jax/xla` in `$XDG_CACHE_HOME`, else in `~/.cache`, and may be deleted at any
time. `JAX_COMPILATION_CACHE_DIR` names another, `JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing;
both are jax's own.
"""

import glob
import hashlib
import os
import pathlib
import platform
import re
import warnings
from typing import Any

import jax

from arcond_jax import caches

UNREADABLE = re.compile("Error reading persistent compilation cache entry for '([^']+)'")


def keep() -> None:
    """Turns the cache on; a folder that cannot be written is no error, and then nothing is kept."""
    chosen = jax.config.values
    if chosen["jax_compilation_cache_dir"] or not chosen["jax_enable_compilation_cache"]:
        return
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        ours = folder.stat().st_uid == os.getuid()  # programs of others are not run
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return
    if ours and os.access(folder, os.W_OK | os.X_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        _replace_unreadable(folder)


def _replace_unreadable(folder: pathlib.Path) -> None:
    """Removes what jax is about to warn of and to compile, since it keeps a file that is there.

    A process that was killed leaves half an entry. The warning has the name of the program and not
    of the entry, so that all entries of that name go.
    """
    show = warnings.showwarning

    def removed_or_shown(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        found = UNREADABLE.match(str(message))
        if found is None:
            show(message, *args, **kwargs)
            return
        for entry in folder.glob(f"{glob.escape(found[1])}-*"):
            entry.unlink(missing_ok=True)

    warnings.showwarning = removed_or_shown


def _folder() -> pathlib.Path:
    """One for each kind of machine, since homes are shared and code for a CPU fits that CPU."""
    return caches.folder("xla") / hashlib.sha256(_cpu().encode()).hexdigest()[:16]


def _cpu() -> str:
    """What the CPU can do, in the words of the system."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # only Linux has it
        lines = []
    able = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(able)])
