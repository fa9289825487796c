"""The bank keeps the last conditions of each group and unbiased moments of all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcond_jax.transport import bank as bank_lib

update = jax.jit(functools.partial(bank_lib.update_bank, decay=0.9))
NUM_SLOTS, NUM_GROUPS, NUM_ATOMS, WIDTH = 2, 3, 4, 2


def filled(batches, dtype=jnp.float32):
    bank = bank_lib.init_bank(NUM_SLOTS, NUM_GROUPS, num_atoms=NUM_ATOMS, width=WIDTH, dtype=dtype)
    for cond, group in batches:
        bank = update(bank, cond, group=group)
    return bank


def batches(num=4, size=7, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (
            jnp.asarray(rng.normal(size=(size, NUM_SLOTS, WIDTH)), jnp.float32),
            jnp.asarray(rng.integers(0, NUM_GROUPS + 1, size)),  # the last id is the null class
        )
        for _ in range(num)
    ]


def test_ring_holds_exactly_the_last_rows_of_each_group():
    data = batches()
    bank = filled(data)
    cond = np.concatenate([c for c, _ in data])
    group = np.concatenate([g for _, g in data])
    for g in range(NUM_GROUPS):
        rows = cond[group == g]
        assert bank.count[:, g].tolist() == [len(rows)] * NUM_SLOTS
        for s in range(NUM_SLOTS):
            held = {tuple(row) for row in np.asarray(bank.atoms[s, g])[: len(rows)].tolist()}
            assert held == {tuple(row) for row in rows[-NUM_ATOMS:, s].tolist()}


def test_order_between_groups_within_a_batch_does_not_matter():
    cond, group = batches(num=1)[0]
    by_group = np.argsort(np.asarray(group), kind="stable")
    one, other = filled([(cond, group)]), filled([(cond[by_group], group[by_group])])
    np.testing.assert_array_equal(one.atoms, other.atoms)
    np.testing.assert_array_equal(one.count, other.count)
    np.testing.assert_allclose(bank_lib.mean(one), bank_lib.mean(other), atol=1e-6)


def test_moments_are_weighted_means_with_the_bias_of_the_start_removed():
    data = batches()
    bank = filled(data)
    for g in range(NUM_GROUPS):
        total, weight, radius = np.zeros((NUM_SLOTS, WIDTH)), 0.0, np.zeros(NUM_SLOTS)
        for cond, group in data:
            rows = np.asarray(cond)[np.asarray(group) == g]
            if not len(rows):
                continue
            keep = 0.9 ** len(rows)
            total = keep * total + (1 - keep) * rows.mean(axis=0)
            weight = keep * weight + (1 - keep)
            spread = 0.5 * ((rows - total / weight) ** 2).sum(axis=-1).mean(axis=0)
            radius = keep * radius + (1 - keep) * spread
        np.testing.assert_allclose(bank_lib.mean(bank)[:, g], total / weight, atol=1e-6)
        np.testing.assert_allclose(bank_lib.radius(bank)[:, g], radius / weight, atol=1e-6)


def test_first_batch_gives_its_own_moments():
    cond, _ = batches(num=1)[0]
    bank = filled([(cond, jnp.zeros(7, jnp.int32))])
    spread = 0.5 * ((cond - cond.mean(axis=0, keepdims=True)) ** 2).sum(axis=-1).mean(axis=0)
    np.testing.assert_allclose(bank_lib.mean(bank)[:, 0], cond.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(bank_lib.radius(bank)[:, 0], spread, atol=1e-6)
    assert not np.any(bank_lib.mean(bank)[:, 1:])


def test_no_gradient_flows_into_the_bank():
    cond, group = batches(num=1)[0]
    empty = filled([])

    def total(cond):
        bank = update(empty, cond, group=group)
        return bank.atoms.sum() + bank_lib.mean(bank).sum() + bank_lib.radius(bank).sum()

    np.testing.assert_array_equal(jax.grad(total)(cond), 0.0)


def test_atom_weights_are_uniform_over_written_atoms():
    weights = bank_lib.atom_weights(jnp.array([0, 1, 3, 9]), 4)
    third = 1 / 3
    expected = [[0.25] * 4, [1, 0, 0, 0], [third, third, third, 0], [0.25] * 4]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("num_groups", [NUM_GROUPS, 1])
def test_filling_takes_the_rows_that_count(num_groups):
    data = [(cond, np.asarray(group) % NUM_GROUPS) for cond, group in batches()]
    valid = np.arange(7) < 5
    empty = bank_lib.init_bank(NUM_SLOTS, num_groups, num_atoms=NUM_ATOMS, width=WIDTH)

    def read(num_images):
        assert num_images == bank_lib.IMAGES_PER_ATOM * NUM_ATOMS * num_groups
        return ((cond, label, valid) for cond, label in data)

    bank = empty.fill(read, jax.jit, num_classes=NUM_GROUPS)
    cond = jnp.concatenate([c[:5] for c, _ in data])
    label = jnp.concatenate([label[:5] for _, label in data])
    group = label if num_groups > 1 else 0 * label
    expected = jax.jit(bank_lib.update_bank)(empty, cond, group=group)
    jax.tree.map(np.testing.assert_array_equal, bank, expected)


def test_atoms_may_be_kept_in_bfloat16():
    bank = filled(batches(), dtype=jnp.bfloat16)
    assert bank.atoms.dtype == jnp.bfloat16
    assert bank_lib.radius(bank).dtype == jnp.float32
