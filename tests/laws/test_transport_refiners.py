"""Laws of the refiners inside a scan over slots, as the samplers use them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plans
import pytest

from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import (
    bures,
    drift,
    entropic,
    inverse,
    options,
    refiners,
    residual,
    sinkhorn,
)

OPTIONS = options.RefineOptions()
NUM_SLOTS, NUM_GROUPS, WIDTH = 3, 2, 2
ROWS = 48  # rows of each group in a batch


def ideal(rng, rows):
    """Two bumps per group and slot; class-major rows."""
    label = np.repeat(np.arange(NUM_GROUPS), rows)
    size = (len(label), NUM_SLOTS, WIDTH)
    side = rng.choice([-1.0, 1.0], size=(len(label), 1, 1))
    center = side * np.array([1.5, 0.0]) + label[:, None, None] * np.array([0.0, 3.0])
    return (center + 0.4 * rng.normal(size=size)).astype(np.float32), label


def drifted(rng, rows):
    """The ideal law squeezed and shifted, as after a prefix with errors."""
    cond, label = ideal(rng, rows)
    return (0.7 * cond + np.array([0.5, -0.4])).astype(np.float32), label


@jax.jit
def rollout(refiner, cond, label):
    """What a sampler does with a refiner, were the conditions independent of earlier slots."""

    def one_slot(state, inputs):
        slot, cond = inputs
        cond, state = refiner(cond, state, slot=slot, label=label)
        return state, cond

    slots = jnp.arange(NUM_SLOTS)
    state, refined = jax.lax.scan(one_slot, refiner.init(label), (slots, cond.swapaxes(0, 1)))
    return refined.swapaxes(0, 1), state


@pytest.fixture(scope="module")
def bank():
    cond, label = ideal(np.random.default_rng(0), 64)
    empty = bank_lib.init_bank(NUM_SLOTS, NUM_GROUPS, num_atoms=64, width=WIDTH)
    return bank_lib.update_bank(empty, jnp.asarray(cond), group=jnp.asarray(label))


@pytest.fixture(scope="module")
def batch():
    cond, label = drifted(np.random.default_rng(1), ROWS)
    return jnp.asarray(cond), jnp.asarray(label)


@pytest.fixture(scope="module")
def calibrated(bank, batch):
    calibrator = refiners.Calibrator(bank=bank, options=OPTIONS)
    refined, state = rollout(calibrator, *batch)
    return refined, calibrator.finish(state)


def energy_gain(refiner):
    """Energy distance to fresh ideal conditions before and after, on fresh draws of the source."""
    cond, label = drifted(np.random.default_rng(2), 200)
    reference, reference_label = ideal(np.random.default_rng(3), 200)
    refined, _ = rollout(refiner, jnp.asarray(cond), jnp.asarray(label))
    labels = {"label": label, "reference_label": reference_label}
    return (
        drift.energy_distance(cond, reference, **labels),
        drift.energy_distance(np.asarray(refined), reference, **labels),
    )


def test_identity_changes_nothing(batch):
    refined, state = rollout(refiners.Identity(), *batch)
    np.testing.assert_array_equal(refined, batch[0])
    assert state is None


@pytest.mark.long
def test_calibrated_map_brings_fresh_conditions_closer_to_the_ideal_law(calibrated):
    before, after = energy_gain(calibrated[1])
    assert np.all(after < 0.5 * before)


def test_calibrated_gaussian_map_brings_fresh_conditions_closer(bank, batch):
    calibrator = refiners.Calibrator(bank=bank, options=OPTIONS, kind=bures.Gaussian())
    _, state = rollout(calibrator, *batch)
    before, after = energy_gain(calibrator.finish(state))
    assert np.all(after < 0.5 * before)


def test_jit_can_tell_the_calibrators_apart(bank):
    kinds = (entropic.PerGroup(), bures.Gaussian(), residual.Residual())
    made = {jax.tree.structure(refiners.Calibrator(bank=bank, kind=kind)) for kind in kinds}
    assert len(made) == 3


def test_calibrator_leaves_each_row_out_of_its_own_map(calibrated, batch):
    in_sample, _ = rollout(calibrated[1], *batch)
    difference = jnp.abs(in_sample - calibrated[0]).max()
    # The same map but for one of 48 points.
    assert 1e-4 < difference < 0.5


def test_rows_do_not_depend_on_their_batch(calibrated, batch):
    cond, label = batch
    refined, _ = rollout(calibrated[1], cond, label)
    alone, _ = rollout(calibrated[1], cond[-1:], label[-1:])
    np.testing.assert_allclose(alone[0], refined[-1], atol=2e-6)


@pytest.mark.parametrize("kind", [entropic.PerGroup(), bures.Gaussian()])
def test_null_class_rows_come_back_untouched(bank, batch, kind):
    calibrator = refiners.Calibrator(bank=bank, options=OPTIONS, kind=kind)
    refiner = calibrator.finish(rollout(calibrator, *batch)[1])
    cond, label = batch
    refined, _ = rollout(refiner, cond, label.at[:5].set(NUM_GROUPS))
    np.testing.assert_array_equal(refined[:5], cond[:5])
    assert jnp.abs(refined[5:] - cond[5:]).max() > 0.1


def test_shared_grouping_uses_one_map_for_all_labels(bank, batch):
    one_group = jax.tree.map(lambda leaf: leaf[:, :1], bank)
    calibrator = refiners.Calibrator(bank=one_group, options=OPTIONS, grouping="shared")
    stored = calibrator.finish(rollout(calibrator, *batch)[1])
    cond, label = batch
    refined, _ = rollout(stored, cond, label)
    np.testing.assert_allclose(rollout(stored, cond, 0 * label)[0], refined, atol=0)
    assert jnp.abs(refined - cond).max() > 0.1


def test_slots_with_too_few_atoms_are_left_alone(bank, batch):
    count = bank.count.at[1, 0].set(1)
    calibrator = refiners.Calibrator(bank=bank.replace(count=count), options=OPTIONS)
    cond, label = batch
    refined, state = rollout(calibrator, cond, label)
    again, _ = rollout(calibrator.finish(state), cond, label)
    for result in (refined, again):
        np.testing.assert_array_equal(result[:ROWS, 1], cond[:ROWS, 1])
        assert jnp.abs(result[ROWS:, 1] - cond[ROWS:, 1]).max() > 0.1


def test_in_batch_warm_start_lowers_the_marginal_error(bank, batch):
    few = dataclasses.replace(OPTIONS, num_sinkhorn_iters=10, num_self_iters=10)
    refiner = refiners.InBatch(bank=bank, options=few)
    cond, label = batch
    solve = jax.jit(lambda state, slot: refiner(cond[:, slot], state, slot=slot, label=label)[1])
    cold = refiner.init(label)
    warm = solve(cold, jnp.asarray(0))

    def column_error(state):
        """Error of the solution of slot 1, where rows and atoms kept their bump but moved in it."""
        solved = solve(state, jnp.asarray(1))
        cost = sinkhorn.half_squared_distance(cond[:ROWS, 1], bank.atoms[1, 0])
        epsilon = OPTIONS.epsilon * bank_lib.radius(bank)[1, 0]
        potentials = jax.tree.map(lambda leaf: leaf[0], solved.target)
        weights = bank_lib.atom_weights(bank.count[1, 0], bank.atoms.shape[2])
        return plans.marginal_errors(cost, potentials, epsilon=epsilon, weights=weights)[1]

    assert column_error(warm) < 0.5 * column_error(cold)


@pytest.mark.parametrize("debias", [True, False])
def test_in_batch_brings_the_batch_closer(bank, batch, debias):
    chosen = dataclasses.replace(OPTIONS, debias=debias, num_sinkhorn_iters=20, num_self_iters=20)
    cond, label = batch
    refined, _ = rollout(refiners.InBatch(bank=bank, options=chosen), cond, label)
    reference, reference_label = ideal(np.random.default_rng(3), 200)
    labels = {"label": np.asarray(label), "reference_label": reference_label}
    before = drift.energy_distance(np.asarray(cond), reference, **labels)
    after = drift.energy_distance(np.asarray(refined), reference, **labels)
    assert np.all(after < before)


@pytest.mark.parametrize("rows", [3, 2])
def test_a_batch_that_does_not_split_into_groups_is_refused(bank, rows):
    with pytest.raises(ValueError, match="class-major"):
        refiners.InBatch(bank=bank).init(jnp.zeros(rows, jnp.int32))


def test_inverse_term_pulls_towards_what_leads_back(bank, batch, calibrated):
    cond, label = batch
    real, _ = ideal(np.random.default_rng(4), 200)
    learned = inverse.fit_inverse(jnp.asarray(real))
    pulled_options = dataclasses.replace(OPTIONS, inverse_weight=1.0)
    pulled_refiner = calibrated[1].replace(inverse=learned, options=pulled_options)
    plain, _ = rollout(calibrated[1], cond, label)
    pulled, _ = rollout(pulled_refiner, cond, label)
    np.testing.assert_array_equal(pulled[:, 0], plain[:, 0])

    def miss(refined):
        back = refined[:, 1] @ learned.operator[1].T + learned.offset[1][None, :]
        return ((back - plain[:, 0]) ** 2).sum(axis=-1)

    assert jnp.all(miss(pulled) <= miss(plain) + 1e-5)
    with pytest.raises(ValueError, match="inverse_weight"):
        calibrated[1].replace(options=pulled_options).init(label)


def test_drift_is_zero_in_the_mean_for_equal_laws_and_grows_with_a_shift():
    rng = np.random.default_rng(5)
    cond, label = ideal(rng, 300)
    reference, reference_label = ideal(rng, 250)
    labels = {"label": label, "reference_label": reference_label}
    np.testing.assert_allclose(drift.energy_distance(cond, reference, **labels), 0.0, atol=0.03)
    assert np.all(drift.energy_distance(cond + 1.0, reference, **labels) > 0.2)


def test_drift_refuses_a_class_without_reference():
    cond, label = ideal(np.random.default_rng(7), 4)
    with pytest.raises(ValueError, match="Class 1"):
        drift.energy_distance(cond, cond[:4], label=label, reference_label=label[:4])
