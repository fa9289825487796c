"""What the theory promises for exact plans, normal laws and the inverse-process term."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg, optimize
from scipy.spatial import distance

from arcond_jax.transport import bures, inverse, options


def match(x, y):
    """Rows of y in the order of the exact plan from x, and W2."""
    cost = distance.cdist(x, y, "sqeuclidean")
    _, order = optimize.linear_sum_assignment(cost)
    return y[order], np.sqrt(cost[np.arange(len(x)), order].mean())


def exact_step(x, y, step_size):
    return x + step_size * (match(x, y)[0] - x)


def clouds(seed=0, size=40, width=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, width)), 2.0 + 0.5 * rng.normal(size=(size, width))


def random_covariance(rng, width=6):
    root = rng.normal(size=(width, width))
    return root @ root.T / width + 0.1 * np.eye(width)


@pytest.mark.parametrize("tau", [0.25, 1.0, 4.0])
def test_one_step_leaves_the_share_one_over_one_plus_tau_of_the_distance(tau):
    x, y = clouds()
    moved = exact_step(x, y, options.RefineOptions(tau=tau).step_size)
    np.testing.assert_allclose(match(moved, y)[1] / match(x, y)[1], 1 / (1 + tau), rtol=1e-10)


def test_several_steps_are_one_step_of_the_same_total_size():
    x, y = clouds()
    single = options.RefineOptions(tau=0.7)
    several = dataclasses.replace(single, num_jko_steps=4)
    moved = x
    for _ in range(4):
        moved = exact_step(moved, y, single.step_size)
    np.testing.assert_allclose(moved, exact_step(x, y, several.step_size), atol=1e-12)


def test_two_laws_may_part_while_each_comes_closer_to_the_ideal_one():
    small, tau = 0.05, 1 / 3
    ideal = np.array([[1.0, 0.0], [-1.0, 0.0]])
    x = np.array([[small, 1.0], [-small, -1.0]])
    y = np.array([[-small, 1.0], [small, -1.0]])
    step_size = options.RefineOptions(tau=tau).step_size
    assert match(x, y)[1] == pytest.approx(0.10)
    for _ in range(2):
        before = match(x, ideal)[1]
        x, y = exact_step(x, ideal, step_size), exact_step(y, ideal, step_size)
        assert match(x, ideal)[1] / before == pytest.approx(0.75, abs=1e-12)
    assert match(x, y)[1] == pytest.approx(0.93125)


def test_gaussian_map_carries_one_covariance_onto_the_other():
    rng = np.random.default_rng(0)
    source, target = random_covariance(rng), random_covariance(rng)
    with jax.enable_x64(True):
        matrix = np.asarray(bures.transport_matrix(jnp.asarray(source), jnp.asarray(target)))
        same = np.asarray(bures.transport_matrix(jnp.asarray(source), jnp.asarray(source)))
    np.testing.assert_allclose(matrix @ source @ matrix, target, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix.T, atol=0)
    np.testing.assert_allclose(same, np.eye(6), atol=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_gaussian_step_leaves_the_same_share_of_the_distance(tau):
    rng = np.random.default_rng(1)
    source, target = random_covariance(rng), random_covariance(rng)
    with jax.enable_x64(True):
        matrix = np.asarray(bures.transport_matrix(jnp.asarray(source), jnp.asarray(target)))
    share = options.RefineOptions(tau=tau).step_size
    partial = (1 - share) * np.eye(6) + share * matrix

    def squared_distance(a, b):
        root = linalg.sqrtm(a).real
        return np.trace(a + b - 2 * linalg.sqrtm(root @ b @ root).real)

    ratio = squared_distance(partial @ source @ partial, target) / squared_distance(source, target)
    np.testing.assert_allclose(np.sqrt(ratio), 1 / (1 + tau), rtol=1e-10)


@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("tau", [0.2, 1.0, 5.0])
def test_step_with_the_inverse_term_never_raises_the_objective(weight, tau):
    rng = np.random.default_rng(2)
    x, ideal = clouds(seed=2, size=24)
    operator, offset = rng.normal(size=(3, 3)), rng.normal(size=3)
    previous = np.broadcast_to(rng.normal(size=(1, 3)), (24, 3))
    chosen = options.RefineOptions(tau=tau, inverse_weight=weight)

    def objective(u):
        miss = u @ operator.T + offset - previous
        return 0.5 * match(u, ideal)[1] ** 2 + 0.5 * weight * (miss**2).sum(-1).mean()

    with jax.enable_x64(True):
        learned = inverse.Inverse(
            operator=jnp.asarray(operator), offset=jnp.asarray(offset), valid=jnp.asarray(True)
        )
        for _ in range(4):
            moved = exact_step(x, ideal, chosen.step_size)
            moved = inverse.pull(
                jnp.asarray(moved), jnp.asarray(previous), inverse=learned, options=chosen
            )
            moved = np.asarray(moved)
            assert objective(moved) + match(moved, x)[1] ** 2 / (2 * tau) <= objective(x) + 1e-12
            x = moved


def test_without_the_inverse_term_iterated_steps_reach_the_ideal_law():
    x, ideal = clouds(seed=3)
    for _ in range(60):
        x = exact_step(x, ideal, options.RefineOptions().step_size)
    assert match(x, ideal)[1] < 1e-12


def test_ridge_regression_recovers_a_linear_way_back():
    rng = np.random.default_rng(4)
    operator, offset = rng.normal(size=(3, 3)), rng.normal(size=3)
    later = rng.normal(size=(200, 3))
    cond = np.stack([later @ operator.T + offset, later], axis=1)
    learned = inverse.fit_inverse(jnp.asarray(cond, jnp.float32), ridge=1e-6)
    np.testing.assert_allclose(learned.operator[1], operator, atol=1e-3)
    np.testing.assert_allclose(learned.offset[1], offset, atol=1e-3)
    assert learned.valid.tolist() == [False, True]


@pytest.mark.parametrize(
    ("field", "value"),
    [("tau", -1.0), ("num_jko_steps", 0), ("epsilon", 0.0), ("max_move", -1.0), ("min_atoms", 1)],
)
def test_options_out_of_range_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        options.RefineOptions(**{field: value})
