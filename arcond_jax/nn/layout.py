"""How parameters lie in memory while a loop reads them at each of its steps.

To be called outside the loop. What is computed stays the same.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jaxtyping import DTypeLike

from arcond_jax import placement

STACKED = "blocks"  # below this name parameters have a leading axis of layers; `stack.scanned`
TURNED = "turned_kernel"
ROUNDED = ("kernel", "table")  # what `linear` computes with, in its own type
FEW_ROWS = 128  # for more rows a CPU is faster with kernels as they are


def apart(params: Any) -> Any:
    """Replaces every stacked parameter by the tuple of its layers.

    For a loop that runs a stack unrolled. A body that takes layers out of the stack may copy all
    weights at every step, as XLA does on a CPU. Cut here, and with `together` inside the loop, they
    are not copied: slices of a concatenation are its parts.
    """

    def cut(path: tuple, leaf: Any) -> Any:
        return tuple(leaf) if jax.tree_util.DictKey(STACKED) in path else leaf

    return jax.tree_util.tree_map_with_path(cut, params)


def together(params: Any) -> Any:
    """The stacked parameters again; the inverse of `apart`."""
    return jax.tree.map(
        lambda leaf: jnp.stack(leaf) if isinstance(leaf, tuple) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def for_rows(params: Any, num_rows: int) -> Any:
    """The parameters turned, where that is faster: on a CPU, if few rows are multiplied at a time.

    Such a product takes as long as its kernel takes to read; with the input axis last XLA reads 1.5
    to 3.5 times faster. A program for any number of rows has them as they are.
    """
    if jax.export.is_symbolic_dim(num_rows) or num_rows > FEW_ROWS:
        return params
    return turned(params) if placement.platform() == "cpu" else params


def rounded(params: Mapping[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """The kernels and tables in the type they are used in.

    A loop over layers rounds what it takes out of the stack, again at each step of the loop around
    it. Biases and norms, of which some are used in float32, are small.
    """

    def round_one(path: tuple, leaf: Any) -> Any:
        last = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else None
        return leaf.astype(dtype) if last in ROUNDED else leaf

    return jax.tree_util.tree_map_with_path(round_one, params)


def turned(params: Mapping[str, Any], *, stacked: bool = False) -> dict[str, Any]:
    """Replaces every `kernel` [i, *features] by the `turned_kernel` [*features, i] of `Linear`.

    Args:
      stacked: Whether there is a leading axis of layers already here.
    """
    result = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            result[name] = turned(value, stacked=stacked or name == STACKED)
        elif name == "kernel":
            result[TURNED] = jnp.moveaxis(value, int(stacked), -1)
        else:
            result[name] = value
    return result
