"""How far a transport plan is from its marginals."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from arcond_jax.transport import sinkhorn


def marginal_errors(
    cost: Float[Array, "n m"],
    potentials: sinkhorn.Potentials,
    *,
    epsilon: Float[Array, ""],
    weights: Float[Array, " m"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Total variation of the plan's row and column marginals to the wanted ones, in [0, 1]."""
    f, g = potentials.f, potentials.g
    plan = jnp.exp((f[:, None] + g[None, :] - cost) / epsilon)
    row_error = 0.5 * jnp.abs(plan.sum(axis=1) - 1.0 / cost.shape[0]).sum()
    column_error = 0.5 * jnp.abs(plan.sum(axis=0) - weights).sum()
    return row_error, column_error
