"""The inverse-process term R: a condition should lead back to the one before it.

Comes in: conditions of real prefixes in decoding order. Goes out: a linear operator per slot and
the closed form of its proximal step. "Condition Errors Refinement" (ICLR 2026), the term weighted
by lambda; a linear operator replaces the paper's unspecified inverse. With it the limit is no
longer the ideal law, and on small images no benefit was measured, so it is off by default.
"""

from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from arcond_jax.transport import options as options_lib


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Inverse:
    """Predicts the condition of the slot before: `operator @ cond + offset`.

    Attributes:
      operator: Ridge regression weights.
      offset: Ridge regression intercept.
      valid: False for the first slot, which has nothing before it.
    """

    operator: Float[Array, "*s e d"]
    offset: Float[Array, "*s e"]
    valid: Bool[Array, "*s"]


def fit_inverse(cond: Float[Array, "n s d"], *, ridge: float = 1e-2) -> Inverse:
    """Learns to step back one slot from conditions of real prefixes.

    Args:
      cond: Teacher-forced conditions, slots in decoding order.
      ridge: Ridge penalty in units of the mean variance of a coordinate; positive.

    Returns:
      One operator per slot.
    """
    cond = cond.astype(jnp.float32).swapaxes(0, 1)
    before = jnp.roll(cond, 1, axis=0)

    def regress(
        x: Float[Array, "n d"], y: Float[Array, "n d"]
    ) -> tuple[Float[Array, "d d"], Float[Array, " d"]]:
        x_mean, y_mean = x.mean(axis=0, keepdims=True), y.mean(axis=0, keepdims=True)
        gram = jnp.matmul((x - x_mean).T, x - x_mean, precision="highest") / x.shape[0]
        cross = jnp.matmul((x - x_mean).T, y - y_mean, precision="highest") / x.shape[0]
        # The absolute floor serves slots whose condition is the same in all rows.
        penalty = ridge * jnp.trace(gram) / x.shape[1] + 1e-6
        operator = jnp.linalg.solve(gram + penalty * jnp.eye(x.shape[1]), cross).T
        offset = y_mean - jnp.matmul(x_mean, operator.T, precision="highest")
        return operator, offset[0]

    operator, offset = jax.vmap(regress)(cond, before)
    return Inverse(operator=operator, offset=offset, valid=jnp.arange(cond.shape[0]) > 0)


def pull(
    cond: Float[Array, "b d"],
    previous: Float[Array, "b e"],
    *,
    inverse: Inverse,
    options: options_lib.RefineOptions,
) -> Float[Array, "b d"]:
    """Takes the proximal step of R around transported conditions.

    Minimises k/2 |u - cond|^2 + weight/2 |operator u + offset - previous|^2 over u, row by row. The
    transport term and the step's own 1/(2 tau) add up to k = 1 + 1/tau, which is 1/step_size for
    one step; several steps count as one of the same total size.

    Args:
      cond: Conditions after the transport step.
      previous: Refined conditions of the slot before.
      inverse: Operator of this slot.
      options: Static choices.

    Returns:
      The minimisers; `cond` itself for a first slot.
    """
    weight, curvature = options.inverse_weight, 1.0 / options.step_size
    dtype = jnp.promote_types(cond.dtype, jnp.float32)
    start, operator = cond.astype(dtype), inverse.operator
    miss = previous - inverse.offset[None, :] - jnp.matmul(start, operator.T, precision="highest")
    hessian = curvature * jnp.eye(start.shape[1], dtype=dtype)
    hessian = hessian + weight * jnp.matmul(operator.T, operator, precision="highest")
    gain = jnp.linalg.solve(hessian, weight * operator.T)
    pulled = start + jnp.matmul(miss, gain.T, precision="highest")
    return jnp.where(inverse.valid, pulled, start).astype(cond.dtype)
