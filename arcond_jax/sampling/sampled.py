"""What every sampling loop returns, and the random numbers of its rows."""

from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from arcond_jax import types


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Sampled:
    """What one run of the loop leaves.

    Attributes:
      tokens: Latents, codes or both.
      drafts: The window of codes drawn at each position, its first code final; None if there are
        none.
      cond: Conditions before and after refinement (conditional stream), one per slot, if traced.
      refiner_state: What the refiner carried out of the last slot.
      emitted: Of speculative sampling: how many calls of the network gave 1 to w codes of each row.
      variation: Of relaxed speculative sampling: how far the law of a verified code is from that
        of the loop without drafts, as total variation, on average over those of each row.
    """

    tokens: types.Tokens
    drafts: Int[Array, "b l w"] | None = None
    cond: tuple[Float[Array, "b s d"], Float[Array, "b s d"]] | None = None
    refiner_state: types.RefinerState = None
    emitted: Int[Array, "b w"] | None = None
    variation: Float[Array, " b"] | None = None


def row_rngs(
    rng: Key[Array, ""], num_rows: int, first_row: Int[Array, ""] | int
) -> Key[Array, " b"]:
    """One key per row, from the row's number alone: a sample does not depend on its batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, first_row + jnp.arange(num_rows))
