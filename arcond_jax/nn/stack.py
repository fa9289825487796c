"""A stack of equal blocks as one scan: it compiles once whatever the depth."""

from typing import Any

import flax.linen as nn
import jax

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
