"""A stack of equal blocks as one scan: it compiles once whatever the depth."""

from typing import Any

import flax.linen as nn
import jax

from arcond_jax.nn import parameter

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
    return nn.scan(
        rematerialised(block, remat, in_scan=True),
        variable_axes={"params": 0, parameter.WHOLE: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def rematerialised(
    block: type[nn.Module],
    remat: str,
    *,
    in_scan: bool = False,
    static_argnums: tuple[int, ...] = (),
) -> type[nn.Module]:
    """`block`, whose backward pass computes again what `remat` says, as in `scanned`.

    Args:
      static_argnums: Inputs of its call that are no arrays, counted from 1.
    """
    if remat == "none":
        return block
    return nn.remat(
        block,
        policy=REMAT_POLICIES[remat],
        prevent_cse=not in_scan,  # inside a scan it only blocks optimisation
        static_argnums=static_argnums,
    )
