"""Where things are kept that can be made again: a folder of the user's, which may be deleted."""

import os
import pathlib


def folder(name: str) -> pathlib.Path:
    """`arcond_jax/NAME` in `$XDG_CACHE_HOME`, else in `~/.cache`; it need not be there.

    Raises:
      RuntimeError: The user has no home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    # An address that is not absolute is to be ignored, says the XDG base directory specification.
    caches = pathlib.Path(given) if os.path.isabs(given) else pathlib.Path.home() / ".cache"
    return caches / "arcond_jax" / name
