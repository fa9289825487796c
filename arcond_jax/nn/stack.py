"""A stack of equal blocks as one scan: it compiles once whatever the depth."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMAT = ("none", *REMAT_POLICIES)


def scanned(
    block: type[nn.Module], *, depth: int, remat: str, unroll: int = 1, in_axes: Any
) -> type[nn.Module]:
    """`block` repeated; its call maps (carry, *inputs) to (carry, None).

    Args:
      remat: "none", "full" (recompute blocks in the backward pass) or "dots" (keep weight
        products).
      unroll: Blocks per iteration; `depth` unrolls it. Same parameters either way.
      in_axes: One for each input: 0 to hand out slices, `nn.broadcast` for the whole.
    """
    if remat != "none":
        # prevent_cse is for code outside scans; inside it only blocks optimisation.
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def apart(params: Any, *, name: str = "blocks") -> Any:
    """Replaces every stacked parameter below `name` by the tuple of its layers.

    For a loop that runs a stack unrolled at each of its steps. A body that takes layers out of the
    stack may copy all weights at every step, as XLA does on a CPU. Cut here, outside the loop, and
    put `together` inside, they are not copied: slices of a concatenation are its parts.
    """

    def cut(path: tuple, leaf: Any) -> Any:
        return tuple(leaf) if jax.tree_util.DictKey(name) in path else leaf

    return jax.tree_util.tree_map_with_path(cut, params)


def together(params: Any) -> Any:
    """The stacked parameters again; the inverse of `apart`."""
    return jax.tree.map(
        lambda leaf: jnp.stack(leaf) if isinstance(leaf, tuple) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
