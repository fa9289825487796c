"""`python -m arcond_jax` is `arcond`."""

import sys

from arcond_jax.cli import main

sys.exit(main.main())
