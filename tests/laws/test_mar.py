"""Laws of the masked model and of its sampling loop."""

import functools
import itertools
import resource
import time

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from arcond_jax import build, types
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.diffusion import solvers
from arcond_jax.models import diffusion_head, mar
from arcond_jax.sampling import guidance as guidance_lib
from arcond_jax.sampling import mar as sampling
from arcond_jax.transport import refiners

COSINE = schedule_lib.Schedule.cosine()
NETWORK = mar.MAR(
    grid=(4, 4),
    num_classes=3,
    head=diffusion_head.DiffusionHead(channels=2, depth=1, width=16),
    buffer_size=2,
    encoder_depth=1,
    encoder_width=16,
    encoder_num_heads=2,
    decoder_depth=2,
    decoder_width=16,
    decoder_num_heads=2,
    attention_dropout=0.0,
    dropout=0.0,
)
LENGTH, CHANNELS = NETWORK.length, NETWORK.channels
GENERATOR = mar.Generator(NETWORK, COSINE, mask_rate_min=0.3)
LABEL = jnp.array([0, 1, 2, 0])
RNG = jax.random.key(3)
# From 900 of 1000 on: at 999 rounding is amplified 20,000 times.
SOLVER = solvers.Solver(COSINE.respace(np.array([0, 300, 600, 900])))


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(jax.eval_shape(GENERATOR.init, RNG))


@pytest.fixture(scope="module")
def latents():
    return jax.random.normal(jax.random.key(2), (len(LABEL), LENGTH, CHANNELS))


def apply(params, *args, method):
    return NETWORK.apply({"params": params}, *args, method=method)


def sampler(guidance_scale=1.0, schedule="linear", power=None, **changes):
    guidance = guidance_lib.Guidance(guidance_scale, schedule=schedule, power=power)
    options = dict(num_ar_steps=4, guidance=guidance, num_buckets=2)
    return sampling.MARSampler(NETWORK, SOLVER, **(options | changes))


def compiled(loop):
    """The jitted sampler, `first_row` included."""

    @jax.jit
    def run(params, rng, label, refiner, first_row):
        return loop(params, rng, label, refiner=refiner, first_row=first_row)

    return run


IDENTITY = refiners.Identity()
plain_run = compiled(sampler())


@pytest.fixture(scope="module")
def plain(params):
    """What the sampler draws without guidance; most laws compare with it."""
    return plain_run(params, RNG, LABEL, IDENTITY, 0).tokens.latents


# The network.


def test_slots_that_are_not_visible_do_not_matter(params, latents):
    order = mar.random_orders(RNG, len(LABEL), LENGTH)
    ordered = mar.in_order(latents, order)

    def conditions(tokens, n):
        encoded = apply(params, tokens[:, :n], order[:, :n], LABEL, 5, method=mar.MAR.encode)
        return apply(params, encoded, order, 5, method=mar.MAR.decode)

    conditions = jax.jit(conditions, static_argnums=1)
    few, many = conditions(ordered, 5), conditions(ordered, LENGTH)
    np.testing.assert_allclose(few, many, atol=2e-6)
    other = jnp.where(jnp.arange(LENGTH)[:, None] < 5, ordered, 7.0)
    np.testing.assert_array_equal(conditions(other, LENGTH), many)


def test_conditions_of_some_positions_are_those_of_all(params, latents):
    order = mar.random_orders(RNG, len(LABEL), LENGTH)

    @jax.jit
    def both(params):
        tokens = mar.in_order(latents, order)[:, :4]
        encoded = apply(params, tokens, order[:, :4], LABEL, 4, method=mar.MAR.encode)
        whole = apply(params, encoded, order, 4, method=mar.MAR.decode)
        return whole, apply(params, encoded, order, 4, 4, 3, method=mar.MAR.decode)

    whole, part = both(params)
    np.testing.assert_allclose(part, whole[:, 4:7], atol=2e-6)


def test_orders_are_permutations_and_are_undone(latents):
    order = mar.random_orders(RNG, len(LABEL), LENGTH)
    np.testing.assert_array_equal(jnp.sort(order, axis=-1)[0], jnp.arange(LENGTH))
    assert len({tuple(row.tolist()) for row in order}) == len(LABEL)
    np.testing.assert_array_equal(mar.in_grid(mar.in_order(latents, order), order), latents)


# Training.


def test_mask_rates_are_a_truncated_normal():
    generator = mar.Generator(NETWORK, COSINE, mask_rate_min=0.7)
    assert generator.max_visible == 4
    rngs = jax.random.split(RNG, 4000)
    visible = np.asarray(jax.vmap(generator._num_visible)(rngs))
    assert visible.min() == 0 and visible.max() == 4
    # P(visible = n) = P(ceil(16 r) = 16 - n), r normal around 1 with deviation 0.25 on [0.7, 1].
    reference = 1.0 - np.abs(np.random.default_rng(0).normal(0, 0.25, 400_000))
    reference = LENGTH - np.ceil(LENGTH * reference[reference >= 0.7])
    expected = [np.mean(reference == n) for n in range(5)]
    np.testing.assert_allclose([np.mean(visible == n) for n in range(5)], expected, atol=0.03)


def test_only_masked_positions_are_trained(params, latents):
    """The gradient of the loss for the latents as targets is nothing where they are visible."""
    t = jnp.full((len(latents), 1, LENGTH), 500)
    noise = jnp.zeros((*t.shape, latents.shape[-1]))
    order = mar.random_orders(RNG, len(LABEL), LENGTH)
    masked = jnp.arange(LENGTH) >= 4

    def loss(targets):
        cond = GENERATOR.teacher_forced(params, latents, order, LABEL, 4)
        mse, vb = GENERATOR.head_losses(params, cond, targets, t, noise)
        return jnp.mean(mse + vb, where=masked)

    gradient = jnp.abs(jax.jit(jax.grad(loss))(latents)).sum(axis=(0, 2))
    assert (gradient[:4] == 0).all() and (gradient[4:] > 0).all()


def test_dropout_acts_in_training_alone(params, latents):
    network = NETWORK.clone(dropout=0.5, attention_dropout=0.5)
    generator = mar.Generator(network, COSINE, mask_rate_min=0.3)
    order = jnp.broadcast_to(jnp.arange(LENGTH), latents.shape[:2])

    given = (params, latents, order, LABEL, 3)

    @jax.jit
    def dropping(rng):
        return generator.teacher_forced(*given, rngs={"dropout": rng})

    without, other = (jax.jit(x.teacher_forced).lower(*given) for x in (GENERATOR, generator))
    assert other.as_text() == without.as_text()
    plain = without.compile()(*given)
    a, b = (dropping(jax.random.key(seed)) for seed in (0, 1))
    assert jnp.abs(a - plain).max() > 0.01 and jnp.abs(a - b).max() > 0.01


@pytest.mark.slow
def test_the_loss_falls(latents):
    tokens = types.Tokens(latents=latents)
    params = nn.unbox(jax.jit(GENERATOR.init)(jax.random.key(0)))
    optimizer = optax.adam(3e-3)
    value_and_grad = jax.value_and_grad(
        lambda p, rng: GENERATOR.loss(p, tokens, LABEL, rng), has_aux=True
    )

    @jax.jit
    def train(params):
        def body(carry, rng):
            params, state = carry
            (loss, _), grads = value_and_grad(params, rng)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(body, (params, optimizer.init(params)), jax.random.split(RNG, 60))[1]

    losses = np.asarray(train(params))
    assert losses[-10:].mean() < 0.8 * losses[:10].mean()


# The steps and their buckets.


@pytest.mark.parametrize("length", [1, 5, 16, 64, 256])
def test_every_position_is_drawn_once_for_any_number_of_steps(length):
    for num_steps in {1, 2, 3, length // 2, length - 1, length} - {0}:
        if num_steps > length:
            continue
        ends = sampling.step_ends(length, num_steps)
        assert len(ends) == num_steps and ends[-1] == length
        assert (np.diff(np.append(0, ends)) >= 1).all()


def test_steps_follow_the_official_cosine():
    # floor(256 cos(pi/2 k/8)) for k = 1 .. 7.
    masked = [251, 236, 212, 181, 142, 97, 49, 0]
    np.testing.assert_array_equal(256 - sampling.step_ends(256, 8), masked)


@pytest.mark.parametrize("num_steps", [0, 17])
def test_steps_out_of_range(num_steps):
    with pytest.raises(ValueError, match=f"num_ar_steps {num_steps} is out of range: .* 1 to 16"):
        sampler(num_ar_steps=num_steps)


def cut(ends, num_buckets, num_known=0, costs=(3, 2)):
    return sampling.fewest_padded(
        np.array(ends),
        num_known=num_known,
        num_buckets=num_buckets,
        slot_cost=costs[0],
        drawn_cost=costs[1],
    )


@pytest.mark.parametrize(
    ("length", "num_steps", "num_known"), [(16, 5, 0), (64, 64, 0), (64, 63, 0), (256, 64, 100)]
)
@pytest.mark.parametrize("num_buckets", [1, 3, 8])
def test_buckets_hold_every_step(length, num_steps, num_known, num_buckets):
    ends = sampling.step_ends(length, num_steps, num_known=num_known)
    starts = np.append(num_known, ends[:-1])
    buckets = cut(ends, num_buckets, num_known)
    steps = [step for bucket in buckets for step in range(bucket.start, bucket.stop)]
    assert steps == list(range(num_steps))
    for bucket in buckets:
        for step in range(bucket.start, bucket.stop):
            assert starts[step] <= bucket.num_slots
            assert ends[step] - starts[step] <= bucket.num_drawn
            assert starts[step] + bucket.num_drawn <= length


def test_buckets_waste_as_little_as_can_be():
    ends = [1, 2, 4, 7, 11, 16]
    starts, due = [0, *ends[:-1]], np.diff([0, *ends])

    def work(edges):
        return sum(
            (j - i) * (3 * starts[j - 1] + 2 * due[i:j].max()) for i, j in itertools.pairwise(edges)
        )

    for num_buckets in (1, 2, 3, 6):
        buckets = cut(ends, num_buckets)
        assert len(buckets) <= num_buckets
        cuts = itertools.combinations(range(1, len(ends)), num_buckets - 1)
        best = min(work((0, *places, len(ends))) for places in cuts)
        assert work([*(b.start for b in buckets), len(ends)]) == best


# Sampling.


def unrolled(params, loop):
    """The same draws step after step, with the shapes each step really needs."""
    rngs = jax.vmap(jax.random.split)(
        jax.vmap(jax.random.fold_in, (None, 0))(RNG, jnp.arange(len(LABEL)))
    )
    rank = jax.vmap(lambda rng: jax.random.uniform(rng, (LENGTH,)))(rngs[:, 0])
    order = jnp.argsort(rank, axis=-1)

    def noise_of(rng, number):
        shape = (loop.solver.num_evaluations + 1, CHANNELS)
        return jax.random.normal(jax.random.fold_in(rng, number), shape)

    noise = jax.vmap(jax.vmap(noise_of, (None, 0), 1), (0, None), 1)(rngs[:, 1], jnp.arange(LENGTH))
    tokens = jnp.zeros((len(LABEL), LENGTH, CHANNELS))
    ends = sampling.step_ends(LENGTH, loop.num_ar_steps).tolist()
    labels = jnp.stack([LABEL, jnp.full_like(LABEL, NETWORK.num_classes)])
    for start, end in itertools.pairwise([0, *ends]):

        def condition(label, start=start, end=end, tokens=tokens):
            encoded = apply(
                params, tokens[:, :start], order[:, :start], label, start, method=mar.MAR.encode
            )
            return apply(params, encoded, order, start, method=mar.MAR.decode)[:, start:end]

        conds = jax.vmap(condition)(labels)
        share = min(end, LENGTH - 1) / LENGTH
        weight = 1.0 + (loop.guidance.scale - 1.0) * share

        def denoise(x, t, conds=conds, weight=weight):
            a, b = jax.vmap(lambda cond: apply(params, x, t, cond, method=mar.MAR.denoise))(conds)
            predicted, v = jnp.split(a, 2, axis=-1)
            plain = jnp.split(b, 2, axis=-1)[0]
            return jnp.concatenate([plain + weight * (predicted - plain), v], axis=-1)

        drawn = loop.solver(denoise, noise[0, :, start:end], noise[1:, :, start:end])
        tokens = tokens.at[:, start:end].set(drawn)
    return mar.in_grid(tokens, order)


@pytest.mark.long
def test_buckets_equal_an_unrolled_loop(params):
    # Both steps in one bucket: the first sees slots that are empty and draws too many tokens.
    loop = sampler(guidance_scale=2.0, num_ar_steps=2, num_buckets=1)
    assert len(loop.buckets()) == 1
    drawn = compiled(loop)(params, RNG, LABEL, IDENTITY, 0).tokens.latents
    reference = jax.jit(lambda params: unrolled(params, loop))(params)
    np.testing.assert_allclose(drawn, reference, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_the_number_of_buckets_changes_nothing(params, plain):
    other = compiled(sampler(num_buckets=4))(params, RNG, LABEL, IDENTITY, 0).tokens.latents
    np.testing.assert_allclose(other, plain, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_guidance_of_one_is_none(params, plain):
    """A doubled batch with weight 1 draws what the conditional rows alone draw."""
    # In one bucket: nothing depends on their number, and half as much is compiled.
    loop = sampler(guidance_scale=1.0 + 1e-7, num_buckets=1)
    assert loop.guidance.on
    drawn = compiled(loop)(params, RNG, LABEL, IDENTITY, 0).tokens.latents
    np.testing.assert_allclose(drawn, plain, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_a_power_of_zero_is_constant_guidance(params, plain):
    def drawn(**guidance):
        loop = sampler(2.0, num_buckets=1, **guidance)
        return compiled(loop)(params, RNG, LABEL, IDENTITY, 0).tokens.latents

    constant, power = drawn(schedule="constant"), drawn(schedule="power_cosine", power=0.0)
    np.testing.assert_allclose(power, constant, rtol=1e-5, atol=1e-6)
    assert jnp.abs(constant - plain).max() > 1e-3


@pytest.mark.long
def test_a_row_does_not_depend_on_its_batch(params, plain):
    alone = compiled(sampler(num_buckets=1))(params, RNG, LABEL[2:3], IDENTITY, 2)
    np.testing.assert_allclose(alone.tokens.latents, plain[2:3], rtol=2e-4, atol=2e-5)


@pytest.mark.long
def test_known_tokens_stay_and_the_rest_is_drawn(params, latents):
    mask = jnp.zeros((len(LABEL), LENGTH), bool).at[:, jnp.array([1, 2, 7, 11, 12])].set(True)
    known = sampling.Known(latents, mask)
    loop = sampler(num_known=5, num_ar_steps=3)

    @jax.jit
    def run(params, known):
        return loop(params, RNG, LABEL, refiner=IDENTITY, known=known).tokens.latents

    drawn = run(params, known)
    np.testing.assert_array_equal(drawn[mask], latents[mask])
    assert (jnp.abs(drawn - latents)[~mask] > 1e-6).all()
    # What is given is looked at.
    other = run(params, sampling.Known(latents + 1.0, mask))
    assert (jnp.abs(other - drawn)[~mask] > 1e-4).any()


def test_known_tokens_and_their_number_go_together(params, latents):
    known = sampling.Known(latents, jnp.zeros((len(LABEL), LENGTH), bool))
    with pytest.raises(ValueError, match="num_known is 0: pass `known` if and only if"):
        sampler()(params, RNG, LABEL, refiner=IDENTITY, known=known)
    with pytest.raises(ValueError, match="16 of 16 tokens are known: leave at least one"):
        sampler(num_known=LENGTH, num_ar_steps=1)


@flax.struct.dataclass
class Counting:
    """Adds a multiple of the slot to every condition, and counts calls."""

    amount: float

    def init(self, label):
        return jnp.zeros((), jnp.int32)

    def __call__(self, cond, state, *, slot, label):
        return cond + self.amount * slot, state + 1


def test_the_refiner_moves_every_drawn_condition(params):
    run = compiled(sampler(num_ar_steps=2, trace=True))
    still, moved = (run(params, RNG, LABEL, Counting(amount), 0) for amount in (0.0, 0.01))
    assert moved.refiner_state == LENGTH  # a bucket for each step: none draws more than is due
    drawn, refined = moved.cond
    assert drawn.shape == (len(LABEL), 2, 16)
    np.testing.assert_allclose(
        refined - drawn, jnp.broadcast_to(0.01 * jnp.arange(2)[:, None], drawn.shape), atol=1e-6
    )
    np.testing.assert_array_equal(*still.cond)
    assert jnp.abs(still.tokens.latents - moved.tokens.latents).max() > 1e-4


@pytest.mark.slow
def test_without_refinement_the_sampler_is_the_plain_one(params, plain):
    """Bit for bit the sampler into which no refiner was ever built."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sampling, "refine_columns", lambda cond, *_, **__: (cond, None))
        bare = compiled(sampler())(params, RNG, LABEL, IDENTITY, 0).tokens.latents
    np.testing.assert_array_equal(bare, plain)


def test_one_program_and_no_transfer(params, plain):
    """All steps run from one compiled program that reads nothing from the host."""
    other, first_row = jax.random.key(9), jnp.asarray(0)
    plain_run(params, RNG, LABEL, IDENTITY, first_row)
    num_programs = plain_run._cache_size()
    with jax.transfer_guard("disallow"):
        again = plain_run(params, RNG, LABEL, IDENTITY, first_row).tokens.latents
        plain_run(params, other, LABEL, IDENTITY, first_row)
    np.testing.assert_array_equal(again, plain)
    assert plain_run._cache_size() == num_programs


def test_conditions_are_those_of_real_prefixes(params, latents):
    """At step 0 nothing is visible, so that only the class and the position can be known."""
    starts = jnp.array([0, 3, 9])
    conditions = jax.jit(functools.partial(GENERATOR.conditions, starts=starts))
    cond = conditions(params, types.Tokens(latents=latents), LABEL, RNG)
    assert cond.shape == (len(LABEL), 3, 16)
    other = conditions(params, types.Tokens(latents=-latents), LABEL, RNG)
    np.testing.assert_allclose(cond[:, 0], other[:, 0], atol=1e-6)
    assert jnp.abs(cond[:, 1:] - other[:, 1:]).max() > 1e-3


@pytest.mark.slow
def test_a_full_mar_b_runs():
    """Loss and conditions of one image at the published size; prints time and peak memory."""
    config = build.load_config("mar_base_imagenet256", ["training.dtype=float32"])
    generator = build.generator(config)
    params = nn.unbox(jax.jit(generator.init)(jax.random.key(0)))
    tokens = types.Tokens(latents=jax.random.normal(RNG, (1, 256, 16)))
    loss = jax.jit(generator.loss).lower(params, tokens, LABEL[:1], RNG).compile()
    start = time.perf_counter()
    value, _ = loss(params, tokens, LABEL[:1], RNG)
    # The head starts at zero: it predicts no noise and the variance in the middle of its range.
    assert 0.9 < float(value) < 1.5
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"MAR-B loss: {time.perf_counter() - start:.1f} s, peak {peak:.2f} GiB")
    assert peak < 8
