"""Numbers of drafts, on windows made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcond_jax.analysis import windows
from arcond_jax.parallel import operations

LENGTH, WINDOW, NUM_CODES = 5, 3, 8
FINAL = np.random.default_rng(0).integers(0, NUM_CODES, (6, LENGTH + WINDOW))
LABEL = np.array([0, 1, 0, 1, 0, 1])


def right(final):
    """Windows whose drafts are never changed."""
    return np.stack([final[:, j : j + LENGTH] for j in range(WINDOW)], axis=-1)


def test_what_was_said_of_a_position_lies_along_a_diagonal():
    drafts = np.arange(LENGTH * WINDOW).reshape(1, LENGTH, WINDOW)
    said = windows.by_position(drafts)[0]
    for position in range(LENGTH):
        for entry in range(WINDOW):
            there = entry <= position
            expected = drafts[0, position - entry, entry] if there else drafts[0, position, 0]
            assert said[position, entry] == expected
    held = windows.by_position(right(FINAL))
    np.testing.assert_array_equal(held, np.broadcast_to(held[..., :1], held.shape))


def test_drafts_that_stay_have_no_flips_and_those_of_another_image_have_chance():
    for entry in windows.entries(right(FINAL), LABEL, num_codes=NUM_CODES):
        assert entry.flips == entry.flips_error == 0.0 and entry.kappa == 1.0
        assert entry.entropy == entry.final_entropy
        assert entry.num_drafts == 6 * (LENGTH - entry.entry)
    foreign = right(FINAL)
    foreign[..., 1:] = right(FINAL[windows.others(LABEL)])[..., 1:]
    chance = [x.chance for x in windows.entries(right(FINAL), LABEL, num_codes=NUM_CODES)]
    flips = [x.flips for x in windows.entries(foreign, LABEL, num_codes=NUM_CODES)]
    np.testing.assert_allclose(flips, chance)


def test_flips_are_counted_by_entry():
    drafts = right(FINAL)
    drafts[0, 1, 2] += 1  # one of the 6 x 3 drafts of entry 2
    drafts[:, -1, 1:] += 1  # beyond the end: about no position
    first, second = windows.entries(drafts, LABEL, num_codes=1000)
    assert first.flips == 0.0 and second.flips == pytest.approx(1 / 18)
    assert second.flips_error == pytest.approx(np.std([1 / 3] + [0] * 5, ddof=1) / np.sqrt(6))
    assert second.entropy is None  # 18 drafts say nothing of 1000 codes
    alike = windows.entries(np.ones((2, LENGTH, WINDOW), int), LABEL[:2], num_codes=2)[0]
    assert (alike.flips, alike.chance, alike.kappa, alike.entropy) == (0.0, 0.0, None, 0.0)


def test_others_are_of_the_same_class_where_there_is_one():
    label = np.array([3, 5, 3, 7, 3, 5])
    other = windows.others(label)
    assert np.all(other != np.arange(6))
    np.testing.assert_array_equal(label[other][label != 7], label[label != 7])
    shifted = windows.others(np.arange(4))
    assert sorted(shifted) == [0, 1, 2, 3] and np.all(shifted != np.arange(4))


def test_entropy_of_equally_frequent_codes():
    assert windows.entropy(np.arange(8).repeat(3), 8) == pytest.approx(3.0)
    assert windows.entropy(np.arange(8), 9) is None


def test_tokens_and_acceptance_of_calls():
    emitted = np.array([[1, 2, 0], [3, 0, 2]])  # 4 calls gave one code, 2 two, 2 three
    assert windows.tokens_per_call(emitted) == 14 / 8
    np.testing.assert_allclose(windows.acceptance(emitted), [4 / 8, 2 / 4])
    assert np.isnan(windows.acceptance(np.array([[4, 0, 0]]))[1])


def test_operations_of_loops_and_branches():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 4))

    def program(x):
        y, _ = jax.lax.scan(lambda y, _: (y @ w, None), x, length=5)
        return jax.lax.cond(y.sum() > 0, lambda y: y @ w @ w, lambda y: y, y)

    assert operations.count(jax.jit(program).trace(x).jaxpr) == 7 * 2 * 3 * 4 * 4
    until = jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x))
    assert operations.count(until.trace(x).jaxpr) is None
