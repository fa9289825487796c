"""Laws of the stored entropic map, on points small enough to solve in a second."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plans
import pytest
from ott.geometry import pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn as ott_sinkhorn

from arcond_jax.transport import entropic, options, sinkhorn

DEFAULT = options.RefineOptions()
BIASED = dataclasses.replace(DEFAULT, debias=False)
# A step of size 1 without a clip: what comes out is the entropic map itself.
FULL = dataclasses.replace(DEFAULT, tau=1e9, max_move=None)
FULL_BIASED = dataclasses.replace(FULL, debias=False)
NUM_SOURCE, NUM_ATOMS, WIDTH = 64, 72, 8


def half_square_radius(x):
    return 0.5 * ((x - x.mean(axis=0, keepdims=True)) ** 2).sum(axis=1).mean()


@functools.partial(jax.jit, static_argnames="chosen")
def fit(atoms, source, chosen, count=None):
    count = jnp.asarray(atoms.shape[0] if count is None else count)
    radius = half_square_radius(atoms.astype(jnp.float32))
    return entropic.fit(atoms, source, count=count, radius=radius, options=chosen)


@functools.partial(jax.jit, static_argnames="chosen")
def refine(cond, entropic_map, chosen):
    one = functools.partial(entropic.refine, options=chosen)
    return jax.vmap(one, in_axes=(0, None))(cond, entropic_map)


@jax.jit
def with_self_included(entropic_map):
    """The same map with each source point in its own reach, as for the in-sample laws."""
    source = entropic_map.source
    h = sinkhorn.solve_self(
        sinkhorn.half_squared_distance(source, source),
        epsilon=entropic_map.epsilon,
        num_iters=DEFAULT.num_self_iters,
    )
    return entropic_map.replace(h=h)


@pytest.fixture(scope="module")
def clouds():
    rng = np.random.default_rng(0)
    source = rng.normal(size=(NUM_SOURCE, WIDTH))
    atoms = 0.5 + 1.3 * rng.normal(size=(NUM_ATOMS, WIDTH))
    return jnp.asarray(source, jnp.float32), jnp.asarray(atoms, jnp.float32)


@pytest.fixture(scope="module")
def fitted(clouds):
    return fit(clouds[1], clouds[0], DEFAULT)


@pytest.fixture(scope="module")
def quantiles():
    """Normal quantiles: 1-D clouds whose laws are normal without sampling noise."""
    grid = (jnp.arange(1000) + 0.5) / 1000
    return jax.scipy.special.ndtri(grid)[:, None]


def test_tau_zero_gives_the_condition_back_bit_for_bit(clouds, fitted):
    cond = clouds[0].at[0, 0].set(-0.0)
    none = dataclasses.replace(DEFAULT, tau=0.0)
    refined = refine(cond, fitted, none)
    np.testing.assert_array_equal(
        np.asarray(refined).view(np.uint32), np.asarray(cond).view(np.uint32)
    )


@pytest.mark.parametrize("count", [0, 1])
def test_empty_or_single_atom_is_identity(clouds, count):
    source, atoms = clouds
    refined = refine(source, fit(atoms, source, DEFAULT, count), DEFAULT)
    np.testing.assert_array_equal(refined, source)


def test_equal_laws_are_a_fixed_point_of_the_debiased_map(clouds):
    source, _ = clouds
    same = fit(source, source, DEFAULT)
    # Half the move of a full step: the tolerance is the solver's.
    np.testing.assert_allclose(refine(source, with_self_included(same), DEFAULT), source, atol=1e-2)
    np.testing.assert_allclose(refine(source, same.replace(h=same.g), DEFAULT), source, atol=1e-6)


def test_equal_laws_shrink_under_the_biased_map_as_predicted(quantiles):
    same = fit(quantiles, quantiles, FULL_BIASED)
    variance, half = jnp.var(quantiles), 0.5 * same.epsilon
    slope = (jnp.sqrt(variance**2 + half**2) - half) / variance
    moved = refine(quantiles, same, FULL_BIASED)
    np.testing.assert_allclose(moved.std() / quantiles.std(), slope, atol=1e-3)
    assert slope < 0.98


def test_means_contract_by_one_minus_the_step_size(clouds, fitted):
    source, atoms = clouds
    moved = refine(source, with_self_included(fitted), DEFAULT)
    before, after = (
        source.mean(axis=0) - atoms.mean(axis=0),
        moved.mean(axis=0) - atoms.mean(axis=0),
    )
    np.testing.assert_allclose(
        np.linalg.norm(after) / np.linalg.norm(before), 1 - DEFAULT.step_size, atol=1e-3
    )


def test_slope_between_normal_laws_is_the_closed_form(quantiles):
    source, atoms = 1.5 * quantiles, quantiles
    entropic_map = fit(atoms, source, FULL_BIASED)
    s, t, half = jnp.var(source), jnp.var(atoms), 0.5 * entropic_map.epsilon
    slope = (jnp.sqrt(s * t + half**2) - half) / s
    moved = refine(source, entropic_map, FULL_BIASED)
    np.testing.assert_allclose(moved.std() / source.std(), slope, atol=1e-3)


def test_normal_laws_at_the_fixed_variance_stay_there(quantiles):
    atoms = quantiles
    epsilon = fit(atoms, atoms, BIASED).epsilon
    shrunken = atoms * jnp.sqrt(1.0 - epsilon / jnp.var(atoms))
    moved = refine(shrunken, fit(atoms, shrunken, FULL_BIASED), FULL_BIASED)
    np.testing.assert_allclose(moved.var(), shrunken.var(), atol=1e-3)
    same = fit(atoms, atoms, DEFAULT)
    moved = refine(atoms, with_self_included(same), DEFAULT)
    np.testing.assert_allclose(moved.var(), atoms.var(), atol=1e-3)


def test_permuting_rows_permutes_the_output(clouds, fitted):
    source, _ = clouds
    order = np.random.default_rng(1).permutation(NUM_SOURCE)
    np.testing.assert_array_equal(
        refine(source[order], fitted, DEFAULT), refine(source, fitted, DEFAULT)[order]
    )


def test_permuting_atoms_with_their_potential_changes_nothing(clouds, fitted):
    source, _ = clouds
    order = np.random.default_rng(2).permutation(NUM_ATOMS)
    permuted = fitted.replace(atoms=fitted.atoms[order], g=fitted.g[order])
    np.testing.assert_allclose(
        refine(source, permuted, DEFAULT), refine(source, fitted, DEFAULT), atol=5e-6
    )


def test_a_row_does_not_depend_on_its_batch(clouds, fitted):
    source, _ = clouds
    alone = jnp.concatenate([refine(source[i : i + 1], fitted, DEFAULT) for i in range(3)])
    np.testing.assert_allclose(refine(source, fitted, DEFAULT)[:3], alone, atol=2e-6)


def test_plan_has_the_wanted_marginals_and_mass_one(clouds):
    source, atoms = clouds
    cost = sinkhorn.half_squared_distance(source, atoms)
    weights = jnp.full(NUM_ATOMS, 1 / NUM_ATOMS).at[:4].set(0.0)
    weights = weights / weights.sum()
    epsilon = 0.1 * half_square_radius(atoms)
    solve = jax.jit(sinkhorn.solve_target, static_argnames="num_iters")
    solution = solve(cost, epsilon=epsilon, weights=weights, num_iters=60)
    rows, columns = plans.marginal_errors(cost, solution, epsilon=epsilon, weights=weights)
    assert rows < 1e-5
    assert columns < 1e-5
    plan = jnp.exp((solution.f[:, None] + solution.g[None, :] - cost) / epsilon)
    np.testing.assert_allclose(plan.sum(), 1.0, atol=1e-5)
    np.testing.assert_array_equal(plan[:, :4], 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["near", "far", "duplicates"])
def test_barycentric_map_stays_in_the_hull_of_the_atoms(clouds, fitted, dtype, kind):
    source, _ = clouds
    atoms = fitted.atoms.astype(dtype)
    if kind == "far":
        source = source + 1e4
    if kind == "duplicates":
        atoms = jnp.broadcast_to(atoms[:1], atoms.shape)
    moved = sinkhorn.barycenter(
        sinkhorn.half_squared_distance(source, atoms),
        atoms,
        potential=fitted.g,
        epsilon=fitted.epsilon,
    )
    directions = np.random.default_rng(3).normal(size=(WIDTH, 64))
    atoms = np.asarray(atoms, np.float64) @ directions
    moved = np.asarray(moved, np.float64) @ directions
    assert np.all(moved <= atoms.max(axis=0) + 1e-5)
    assert np.all(moved >= atoms.min(axis=0) - 1e-5)


@pytest.mark.parametrize("kind", ["duplicates", "all far", "one far"])
def test_degenerate_points_give_finite_conditions(clouds, kind):
    source, atoms = clouds
    if kind == "duplicates":
        atoms = jnp.broadcast_to(atoms[:1], atoms.shape)
        source = jnp.broadcast_to(source[:1], source.shape)
    if kind == "all far":
        source = source + 1e4
    if kind == "one far":
        source = source.at[0].set(1e6)
    assert jnp.isfinite(refine(source, fit(atoms, source, DEFAULT), DEFAULT)).all()


def test_moves_are_never_longer_than_the_limit(clouds, fitted):
    source, atoms = clouds
    moved = refine(source + 1e4, fitted, DEFAULT) - (source + 1e4)
    limit = DEFAULT.step_size * DEFAULT.max_move * jnp.sqrt(2 * half_square_radius(atoms))
    assert jnp.linalg.norm(moved, axis=1).max() <= limit * 1.001 + 1e-3


def test_bfloat16_conditions_stay_bfloat16_and_close(clouds, fitted):
    source, _ = clouds
    low = refine(source.astype(jnp.bfloat16), fitted, DEFAULT)
    exact = refine(source, fitted, DEFAULT)
    assert low.dtype == jnp.bfloat16
    error = jnp.linalg.norm(low.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert error < 6e-3


def test_potentials_agree_with_ott_on_its_own_cost(clouds):
    source, atoms = clouds
    epsilon = 0.1 * half_square_radius(atoms)
    cost = sinkhorn.half_squared_distance(source, atoms)
    weights = jnp.full(NUM_ATOMS, 1 / NUM_ATOMS)
    solve = jax.jit(sinkhorn.solve_target, static_argnames="num_iters")
    ours = solve(cost, epsilon=epsilon, weights=weights, num_iters=60)
    moved = sinkhorn.barycenter(cost, atoms, potential=ours.g, epsilon=epsilon)
    # ott's squared cost has no half, so the same problem has twice the epsilon.
    problem = linear_problem.LinearProblem(
        pointcloud.PointCloud(source, atoms, epsilon=2 * epsilon)
    )
    with jax.numpy_rank_promotion("allow"):  # ott's error norm broadcasts a vector
        theirs = jax.jit(ott_sinkhorn.Sinkhorn(threshold=1e-6, max_iterations=2000))(problem)
    np.testing.assert_allclose(moved, NUM_SOURCE * theirs.matrix @ atoms, atol=2e-5)


def test_self_potential_solves_its_own_fixed_point_equation(clouds):
    source, _ = clouds
    epsilon = 0.1 * half_square_radius(source)
    cost = sinkhorn.exclude_self(sinkhorn.half_squared_distance(source, source))
    solve = jax.jit(sinkhorn.solve_self, static_argnames="num_iters")
    h = solve(cost, epsilon=epsilon, num_iters=100)
    plan = jnp.exp((h[:, None] + h[None, :] - cost) / epsilon)
    assert 0.5 * jnp.abs(plan.sum(axis=1) - 1 / NUM_SOURCE).sum() < 1e-4
    np.testing.assert_array_equal(jnp.diag(plan), 0.0)


def test_refine_is_differentiable_everywhere_it_is_used(clouds, fitted):
    source, _ = clouds
    gradient = jax.jit(jax.grad(lambda cond, maps: refine(cond, maps, DEFAULT).sum()))
    assert jnp.isfinite(gradient(source, fitted)).all()
    assert jnp.isfinite(gradient(source + 1e4, fitted)).all()
    still = fitted.replace(atoms=fitted.source, g=fitted.h)  # a map that moves nothing
    np.testing.assert_allclose(gradient(source, still), 1.0, atol=1e-5)


def test_a_cold_start_too_short_for_epsilon_is_refused(clouds):
    source, atoms = clouds
    short = dataclasses.replace(DEFAULT, num_sinkhorn_iters=5)
    with pytest.raises(ValueError, match="use at least 16"):
        fit(atoms, source, short)
