"""Programs for a mesh: the function, where it runs, and what the compiler makes of it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh


class Compiled:
    """`jax.jit` under a mesh, so that constraints inside the models hold.

    Compiles at the first call with arguments of new shapes, or ahead of time:
    `Compiled(f, mesh).lower(*args).compile()`, where arguments may be `jax.ShapeDtypeStruct`.
    """

    def __init__(self, function: Callable[..., Any], mesh: Mesh, **jit_options: Any) -> None:
        self.mesh = mesh
        self._jitted = jax.jit(function, **jit_options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self._jitted(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """The program for arguments of these shapes, as JAX writes it."""
        with jax.set_mesh(self.mesh):
            return self._jitted.trace(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The program for arguments of these shapes, not yet compiled."""
        with jax.set_mesh(self.mesh):
            return self._jitted.lower(*args, **kwargs)
