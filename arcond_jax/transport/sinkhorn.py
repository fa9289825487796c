"""Entropic optimal transport between point clouds, solved by ott-jax in the log domain.

Comes in: costs |x - y|^2 / 2 and an entropy weight. Goes out: dual potentials, which double as the
biases of a softmax over the points (`barycenter`). Cuturi, "Sinkhorn Distances" (2013); the
symmetric self-problem follows Feydy et al., "Interpolating between Optimal Transport and MMD"
(2019). The number of iterations is fixed, so the loops need no communication when sharded.

ott is imported where a problem is solved, since most commands solve none and it takes a second.
"""

import math
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Entropy weight of iteration i is epsilon * max(1, START * DECAY^i): the linear rate depends on the
# range of the cost over epsilon, so a large weight first saves iterations. Two normal clouds of 100
# points in 8 dimensions have their column marginal off by 4e-3 / 4e-5 / 1e-6 in total variation
# after 20 / 40 / 60 iterations; clouds in 2 dimensions converge a hundred times less far.
EPSILON_START = 10.0
EPSILON_DECAY = 0.85
MIN_COLD_ITERS = 1 + math.ceil(-math.log(EPSILON_START) / math.log(EPSILON_DECAY))

# Finite stand-in for infinity: stays finite in float32 after division by any epsilon >= 1e-6.
_FAR = 1e30


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Potentials:
    """Dual potentials with the weights inside: plan = exp((f + g - cost) / epsilon).

    Attributes:
      f: Potential of the rows.
      g: Potential of the columns; about -1e30 where a column has no weight.
    """

    f: Float[Array, "*g n"]
    g: Float[Array, "*g m"]


def half_squared_distance(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Cost |x - y|^2 / 2 in at least float32 (ott's own squared cost has no half)."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x, y = x.astype(dtype), y.astype(dtype)
    # Distances do not change with the origin, but the cancellation below does.
    center = y.mean(axis=0, keepdims=True)
    x, y = x - center, y - center
    dot = jnp.matmul(x, y.T, precision="highest")
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :]
    return jnp.maximum(0.5 * squares - dot, 0.0)


def exclude_self(cost: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Puts each point out of its own reach, as an unseen condition is from every stored one."""
    return jnp.where(jnp.eye(cost.shape[0], dtype=bool), _FAR, cost)


def solve_target(
    cost: Float[Array, "n m"],
    *,
    epsilon: Float[Array, ""],
    weights: Float[Array, " m"],
    num_iters: int,
    init: Potentials | None = None,
) -> Potentials:
    """Solves entropic transport from uniform rows to weighted columns.

    Args:
      cost: Half squared distances.
      epsilon: Final entropy weight in units of the cost; positive.
      weights: Probabilities of the columns; zeros are allowed.
      num_iters: Fixed number of iterations.
      init: Warm start, which runs at constant epsilon; None starts at 0 and lets epsilon decay.

    Returns:
      Potentials; the rows of their plan are exact, the columns converge.

    Raises:
      ValueError: A cold start has too few iterations for epsilon to reach its final value.
    """
    return _solve(cost, epsilon, weights=weights, num_iters=num_iters, init=init)


def solve_self(
    cost: Float[Array, "n n"],
    *,
    epsilon: Float[Array, ""],
    num_iters: int,
    init: Float[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """Solves the symmetric problem of a cloud with itself, h <- (h + softmin(h)) / 2.

    Equal row and column potentials, updated in parallel with weight 1/2, are this iteration (Feydy
    et al. 2019, eq. 25), up to a constant that no softmax sees.

    Args:
      cost: Half squared distances within the cloud; see `exclude_self`.
      epsilon: Final entropy weight in units of the cost; positive.
      num_iters: Fixed number of iterations.
      init: Warm start at constant epsilon; None starts at 0 and lets epsilon decay.

    Returns:
      The potential of both sides.

    Raises:
      ValueError: A cold start has too few iterations for epsilon to reach its final value.
    """
    warm = None if init is None else Potentials(f=init, g=init)
    return _solve(cost, epsilon, num_iters=num_iters, init=warm, symmetric=True).g


def barycenter(
    cost: Float[Array, "n m"],
    points: Float[Array, "m d"],
    *,
    potential: Float[Array, " m"],
    epsilon: Float[Array, ""],
) -> Float[Array, "n d"]:
    """Averages the points with weights softmax((potential - cost) / epsilon), row by row.

    This is the entropic map (Pooladian and Niles-Weed 2021, eq. 9), which also holds for rows the
    potential has never seen; it stays inside the convex hull of the points.
    """
    weights = jax.nn.softmax((potential[None, :] - cost) / epsilon, axis=1)
    return jnp.matmul(weights, points.astype(weights.dtype), precision="highest")


def _solve(
    cost: Float[Array, "n m"],
    epsilon: Float[Array, ""],
    *,
    num_iters: int,
    init: Potentials | None,
    weights: Float[Array, " m"] | None = None,
    symmetric: bool = False,
) -> Potentials:
    """Runs a fixed number of iterations; equal bounds make ott scan instead of test and stop."""
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration, sinkhorn

    entropy = _epsilon(epsilon, decays=init is None, num_iters=num_iters)
    problem = linear_problem.LinearProblem(
        geometry.Geometry(cost_matrix=cost, epsilon=entropy), b=weights
    )
    solver = sinkhorn.Sinkhorn(
        min_iterations=num_iters,
        max_iterations=num_iters,
        inner_iterations=num_iters,
        threshold=-1.0,
        momentum=acceleration.Momentum(value=0.5) if symmetric else None,
        parallel_dual_updates=symmetric,
    )
    with jax.numpy_rank_promotion("allow"):  # ott's error norm broadcasts a vector
        out = solver(problem, init=None if init is None else (init.f, init.g))
    return Potentials(f=out.f, g=jnp.maximum(out.g, -_FAR))


def _epsilon(epsilon: Float[Array, ""], *, decays: bool, num_iters: int) -> Any:
    """The weight of every iteration: decaying from a cold start, constant from a warm one."""
    from ott.geometry import epsilon_scheduler

    if not decays:
        return epsilon_scheduler.Epsilon(epsilon)
    if num_iters < MIN_COLD_ITERS:
        raise ValueError(
            f"{num_iters} Sinkhorn iterations end before epsilon has decayed; "
            f"use at least {MIN_COLD_ITERS}, or a warm start."
        )
    return epsilon_scheduler.Epsilon(epsilon, init=EPSILON_START, decay=EPSILON_DECAY)
