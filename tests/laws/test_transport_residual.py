"""Laws of the map for many classes: means apart, one map of residuals, few directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcond_jax.transport import drift, entropic, options, refiners, residual

OPTIONS = options.RefineOptions()
NUM_SLOTS, NUM_GROUPS, WIDTH, NUM_DIRECTIONS = 2, 5, 6, 2
CENTER = np.random.default_rng(9).normal(size=(NUM_SLOTS, NUM_GROUPS, WIDTH)) * 3.0
SPREAD = np.array([1.2, 1.0, 0.05, 0.05, 0.05, 0.05])  # little outside the first two axes


def ideal(seed, rows):
    """Two bumps in the first axis around the center of each class; class-major rows."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(NUM_GROUPS), rows)
    noise = SPREAD * rng.normal(size=(len(label), NUM_SLOTS, WIDTH))
    noise[..., 0] = 0.3 * noise[..., 0] + rng.choice([-1.2, 1.2], size=noise.shape[:2])
    cond = CENTER[:, label].swapaxes(0, 1) + noise
    return cond.astype(np.float32), label


def drifted(seed, rows):
    """Squeezed around the centers and shifted."""
    cond, label = ideal(seed, rows)
    center = CENTER[:, label].swapaxes(0, 1)
    return (center + 0.6 * (cond - center) + 0.5 * np.eye(WIDTH)[1]).astype(np.float32), label


@jax.jit
def scan(refiner, cond, label):
    def one_slot(state, inputs):
        slot, cond = inputs
        moved, state = refiner(cond, state, slot=slot, label=label)
        return state, moved

    slots = jnp.arange(NUM_SLOTS)
    state, refined = jax.lax.scan(one_slot, refiner.init(label), (slots, cond.swapaxes(0, 1)))
    return refined.swapaxes(0, 1), state


def rollout(refiner, cond, label):
    """All slots of independent conditions, as a sampler goes through them."""
    return scan(refiner, jnp.asarray(cond), jnp.asarray(label))


def fill(batches, num_directions=NUM_DIRECTIONS, num_atoms=200):
    add = jax.jit(residual.add, static_argnames="num_groups")
    moments = None
    for cond, label in batches:
        moments = add(moments, jnp.asarray(cond), group=jnp.asarray(label), num_groups=NUM_GROUPS)
    cond, label = (jnp.concatenate(parts)[:num_atoms] for parts in zip(*batches, strict=True))
    return residual.make_bank(moments, cond, group=label, num_directions=num_directions)


@pytest.fixture(scope="module")
def bank():
    cond, label = ideal(0, 200)
    mixed = np.random.default_rng(1).permutation(len(label))
    return fill([(cond[part], label[part]) for part in np.array_split(mixed, 4)])


def calibrate(bank, cond, label, chosen=OPTIONS):
    calibrator = refiners.Calibrator(bank=bank, options=chosen, kind=residual.Residual())
    refined, state = rollout(calibrator, cond, label)
    return refined, calibrator.finish(state)


@pytest.fixture(scope="module")
def calibrated(bank):
    return calibrate(bank, *drifted(1, 40))[1]


def energy_gain(refiner):
    """Energy distance to fresh ideal conditions before and after, on fresh draws of the source."""
    cond, label = drifted(2, 150)
    reference, reference_label = ideal(3, 150)
    refined, _ = rollout(refiner, cond, label)
    labels = {"label": label, "reference_label": reference_label}
    return (
        drift.energy_distance(cond, reference, **labels),
        drift.energy_distance(np.asarray(refined), reference, **labels),
    )


def test_bank_in_batches_holds_the_moments_of_all_rows(bank):
    cond, label = ideal(0, 200)
    basis = np.asarray(bank.basis)
    for slot in range(NUM_SLOTS):
        mean = np.stack([cond[label == group, slot].mean(axis=0) for group in range(NUM_GROUPS)])
        np.testing.assert_allclose(bank.mean[slot], mean @ basis[slot], atol=2e-5)
        centred = (cond[:, slot] - mean[label]).astype(np.float64)
        vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :NUM_DIRECTIONS]
        # Directions have no sign, so their products are compared.
        np.testing.assert_allclose(basis[slot] @ basis[slot].T, vectors @ vectors.T, atol=2e-4)
    assert np.array_equal(bank.count, np.full((NUM_SLOTS, NUM_GROUPS), 200))


def test_rows_that_do_not_count_change_nothing(bank):
    cond, label = ideal(0, 200)
    batches = [(cond, label), (cond[:7] + 100.0, np.full(7, NUM_GROUPS))]
    with_null = fill(batches)
    np.testing.assert_allclose(with_null.mean, fill(batches[:1]).mean, atol=1e-6)


def test_filling_takes_the_rows_that_count_and_the_few_there_are_again():
    cond, label = ideal(0, 30)
    asked = []

    def read(num_images):
        asked.append(num_images)
        for part in np.array_split(np.arange(len(label)), 3):
            yield (
                jnp.asarray(np.concatenate([cond[part], cond[:1] + 100.0])),
                np.append(label[part], 0),
                np.append(np.ones(len(part), bool), False),
            )

    sizes = dict(num_atoms=200, num_directions=NUM_DIRECTIONS, width=WIDTH)
    bank = residual.init_bank(NUM_SLOTS, NUM_GROUPS, **sizes).fill(
        read, jax.jit, num_classes=NUM_GROUPS
    )
    assert asked == [residual.IMAGES_PER_MEAN * NUM_GROUPS, 200]
    expected = fill([(cond, label)])
    for ours, other in ((bank.mean, expected.mean), (bank.atoms[:, :150], expected.atoms)):
        # Directions have no sign, so vectors are compared where they came from.
        ours, other = (
            x @ b.swapaxes(1, 2) for x, b in ((ours, bank.basis), (other, expected.basis))
        )
        np.testing.assert_allclose(ours, other, atol=5e-5)
    np.testing.assert_array_equal(bank.atoms[:, 150:], bank.atoms[:, :50])
    np.testing.assert_array_equal(bank.count, 30)


@pytest.mark.parametrize("rows", [40, 2])
def test_fresh_conditions_come_closer_to_the_ideal_law(bank, calibrated, rows):
    """Also from two rows of a class, whose own mean is noise."""
    refiner = calibrated if rows == 40 else calibrate(bank, *drifted(1, rows))[1]
    before, after = energy_gain(refiner)
    assert np.all(after < 0.6 * before)


def test_equal_laws_hardly_move(bank):
    _, refiner = calibrate(bank, *ideal(4, 40))
    cond, label = ideal(5, 40)
    refined, _ = rollout(refiner, cond, label)
    move = np.linalg.norm(np.asarray(refined) - cond, axis=-1).mean()
    assert move < 0.15 * np.linalg.norm(SPREAD)


def test_what_lies_outside_the_directions_stays(bank, calibrated):
    cond, label = drifted(2, 40)
    refined, _ = rollout(calibrated, cond, label)
    move = np.asarray(refined) - cond
    outside = np.eye(WIDTH) - np.einsum("sdk,sek->sde", bank.basis, bank.basis)
    np.testing.assert_allclose(np.einsum("bsd,sde->bse", move, outside), 0.0, atol=3e-6)
    assert np.abs(move).max() > 0.1


def test_all_directions_and_one_class_is_the_entropic_map_between_centred_laws():
    cond, target, source = (
        jnp.asarray(make(seed, 60)[0][:60, 0])
        for make, seed in ((drifted, 2), (ideal, 0), (drifted, 1))
    )
    group = jnp.zeros(60, jnp.int32)
    moments = residual.add(None, target[:, None], group=group, num_groups=1)
    bank = residual.make_bank(moments, target[:, None], group=group, num_directions=WIDTH)
    bank = jax.tree.map(lambda leaf: leaf[0], bank)

    @jax.jit
    def refined(bank, source, cond):
        whole = residual.fit(bank, source[None], options=OPTIONS)
        return residual.refine(cond, whole, group=group, options=OPTIONS)

    @jax.jit
    def expected(target, source, cond):
        start, end = source.mean(axis=0), target.mean(axis=0)
        centred = entropic.fit(
            target - end,
            source - start,
            count=jnp.array(60),
            radius=0.5 * ((target - end) ** 2).sum(axis=1).mean(),
            options=OPTIONS,
        )
        moved = entropic.refine_rows(cond - start, centred, options=OPTIONS)
        return moved + start + OPTIONS.step_size * (end - start)

    ours, theirs = refined(bank, source, cond), expected(target, source, cond)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # a turned cloud, in float32


def test_rows_do_not_depend_on_their_batch(calibrated):
    cond, label = drifted(2, 40)
    refined, _ = rollout(calibrated, cond, label)
    alone, _ = rollout(calibrated, cond[-1:], label[-1:])
    np.testing.assert_allclose(alone[0], refined[-1], atol=3e-6)


def test_null_class_and_unseen_classes_come_back_untouched(bank):
    count = bank.count.at[:, 1].set(0)
    _, refiner = calibrate(bank.replace(count=count), *drifted(1, 40))
    cond, label = drifted(2, 40)
    label[:40] = NUM_GROUPS
    refined, _ = rollout(refiner, cond, label)
    np.testing.assert_array_equal(refined[:80], cond[:80])
    assert jnp.abs(refined[80:] - cond[80:]).max() > 0.1


def test_tau_zero_gives_the_condition_back_bit_for_bit(bank):
    cond, label = drifted(1, 40)
    refined, refiner = calibrate(bank, cond, label, options.RefineOptions(tau=0.0))
    np.testing.assert_array_equal(refined, cond)
    np.testing.assert_array_equal(rollout(refiner, cond, label)[0], cond)


def test_more_directions_than_the_width_are_refused():
    with pytest.raises(ValueError, match="num_directions 7 is more than the 6 there are"):
        residual.init_bank(1, 2, num_atoms=8, num_directions=7, width=6)
