"""`python -m arcond_jax` is `arcond`, and like it imports nothing from the current folder."""

import os
import sys

# `-m` puts that folder first, where a numpy.py of anybody's may lie. A checkout stays, as the last.
if not sys.flags.safe_path:
    current = sys.path.pop(0) or "."
    if os.path.exists(current) and os.path.samefile(
        current, os.path.dirname(os.path.dirname(__file__))
    ):
        sys.path.append(current)

from arcond_jax.cli import main

sys.exit(main.main())
