"""The shipped configs as modules: `from arcond_jax.configs import digits`.

They lie in `configs/` beside the package in a checkout, and within it where it is installed.
"""

import pathlib

_HERE = pathlib.Path(__file__).parent
__path__ = [str(next(d for d in (_HERE / "configs", _HERE.parent / "configs") if d.is_dir()))]
