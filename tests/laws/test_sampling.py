"""The compiled sampling loops against plain Python, one row at a time, one device at a time."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from arcond_jax import sharding, types
from arcond_jax.diffusion import schedule, solvers
from arcond_jax.models import diffusion_head, gpt
from arcond_jax.models.joint import Joint
from arcond_jax.sampling import causal, filters, stride
from arcond_jax.sampling import sampled as sampled_lib
from arcond_jax.transport import refiners

NUM_CODES, NUM_CLASSES, CHANNELS, WIDTH, LENGTH, WINDOW = 12, 3, 4, 32, 6, 4
PAD = NUM_CODES
BACKBONE = gpt.GPT(depth=2, width=WIDTH, num_heads=2, grid=(2, 3), mlp_hidden=48)
HEAD = diffusion_head.DiffusionHead(channels=CHANNELS, depth=1, width=16)
PROCESS = schedule.Schedule.cosine()
SOLVER = solvers.Solver(PROCESS.respace(schedule.trailing_timesteps(1000, 3)), clip=3.0)

JOINT = Joint(BACKBONE, NUM_CLASSES, HEAD, NUM_CODES)
IN_WINDOWS = dict(num_codes=NUM_CODES, window=WINDOW, window_depth=1, window_mlp_ratio=0)
WINDOWED = Joint(BACKBONE, NUM_CLASSES, HEAD, **IN_WINDOWS)
CODES_ONLY = Joint(BACKBONE, NUM_CLASSES, **IN_WINDOWS)

IDENTITY = refiners.Identity()
RNG = jax.random.key(5)
LABEL = jnp.array([0, 1, 2, 0, 1, 2])


@pytest.fixture(scope="module")
def params():
    """Of all networks here."""
    init = functools.partial(WINDOWED.init, method=Joint.touch_all)
    return tiny.random_params(jax.eval_shape(init, RNG, LABEL)["params"])


@flax.struct.dataclass
class Shift:
    """A refiner that adds a row per slot to the conditions, and counts its calls."""

    amount: jax.Array

    def init(self, label):
        return jnp.zeros((), jnp.int32)

    def __call__(self, cond, state, *, slot, label):
        assert len(cond) == len(label)  # under guidance too: the unconditional rows pass it by
        return cond + self.amount[slot], state + 1


def compiled(sampler):
    """The jitted sampler; `traces` grows by one each time it is traced."""
    traces = []

    @jax.jit
    def sample(params, rng, label, refiner, first_row):
        traces.append(label.shape)
        return sampler(params, rng, label, refiner=refiner, first_row=first_row)

    sample.traces = traces
    return sample


PLAIN = causal.CausalSampler(JOINT, SOLVER, trace=True)
plain = compiled(PLAIN)


@pytest.fixture(scope="module")
def expected(params):
    return plain(params, RNG, LABEL, IDENTITY, 0)


def teacher_forced(network, params, windows, label, latents=None):
    return network.apply({"params": params}, latents, windows, label, method=Joint.teacher_forced)


def test_sampled_tokens_have_their_shapes_and_vary(expected):
    assert expected.tokens.latents.shape == (6, LENGTH, CHANNELS)
    assert expected.tokens.codes.shape == (6, LENGTH)
    assert expected.drafts is None
    assert np.all(np.isfinite(expected.tokens.latents))
    codes = np.asarray(expected.tokens.codes)
    assert codes.min() >= 0 and codes.max() < NUM_CODES and len(np.unique(codes)) > 4


@pytest.mark.parametrize("window", [1, WINDOW])
def test_conditions_of_sampling_are_those_of_teacher_forcing(params, window, expected):
    network = JOINT if window == 1 else WINDOWED
    if window > 1:
        sample = compiled(dataclasses.replace(PLAIN, network=network))
        expected = sample(params, RNG, LABEL, IDENTITY, 0)
    codes, (drawn, refined) = expected.tokens.codes, expected.cond
    windows = jnp.pad(codes[..., None], ((0, 0), (0, 0), (0, window - 1)), constant_values=PAD)
    forced = jax.jit(functools.partial(teacher_forced, network))(
        params, windows, LABEL, expected.tokens.latents
    )
    np.testing.assert_allclose(drawn, forced, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(drawn, refined)


def test_a_row_does_not_depend_on_its_batch(params, expected):
    for row in range(len(LABEL)):
        alone = plain(params, RNG, LABEL[row : row + 1], IDENTITY, row)
        np.testing.assert_array_equal(alone.tokens.codes[0], expected.tokens.codes[row])
        np.testing.assert_allclose(
            alone.tokens.latents[0], expected.tokens.latents[row], rtol=1e-5, atol=1e-5
        )


def test_the_loop_is_traced_once_and_stays_on_the_device(params, expected):
    first_row, other_label = jnp.asarray(0), jnp.flip(LABEL)
    plain(params, RNG, LABEL, IDENTITY, first_row)
    num_traces = len(plain.traces)
    other_rng = jax.random.key(6)
    with jax.transfer_guard("disallow"):
        other = plain(params, other_rng, other_label, IDENTITY, first_row)
        again = plain(params, RNG, LABEL, IDENTITY, first_row)
    assert len(plain.traces) == num_traces
    assert np.any(other.tokens.codes != expected.tokens.codes)
    np.testing.assert_array_equal(again.tokens.latents, expected.tokens.latents)


def test_refinement_comes_before_the_code_head(params, expected):
    nothing = Shift(jnp.zeros((LENGTH, WIDTH)))
    same = plain(params, RNG, LABEL, nothing, 0)
    assert same.refiner_state == LENGTH
    same, identity = (dataclasses.replace(x, refiner_state=None) for x in (same, expected))
    jax.tree.map(np.testing.assert_array_equal, same, identity)

    amount = jnp.zeros((LENGTH, WIDTH)).at[0].set(3.0 * params["code_head"]["kernel"][:, 7])
    moved = plain(params, RNG, LABEL, Shift(amount), 0)
    np.testing.assert_array_equal(moved.cond[0][:, 0], expected.cond[0][:, 0])
    np.testing.assert_array_equal(
        moved.cond[1] - moved.cond[0] != 0, (amount != 0)[None].repeat(6, 0)
    )
    assert np.mean(moved.tokens.codes[:, 0] == 7) > np.mean(expected.tokens.codes[:, 0] == 7)
    assert np.any(moved.tokens.latents[:, 0] != expected.tokens.latents[:, 0])


def test_an_unrolled_backbone_draws_the_same_and_copies_no_weights(params, expected):
    network = JOINT.clone(backbone=BACKBONE.clone(unroll=BACKBONE.depth))
    sample = compiled(dataclasses.replace(PLAIN, network=network))
    unrolled = sample(params, RNG, LABEL, IDENTITY, 0)
    np.testing.assert_array_equal(unrolled.tokens.codes, expected.tokens.codes)
    np.testing.assert_allclose(
        unrolled.tokens.latents, expected.tokens.latents, rtol=1e-5, atol=1e-5
    )
    # The layers are cut out of what is handed in; the loop neither carries nor makes the stack.
    program = sample.lower(params, RNG, LABEL, IDENTITY, 0).compile().as_text()
    shape = params["trunk"]["blocks"]["qkv"]["kernel"].shape
    stacked = f"f32[{','.join(map(str, shape))}]"
    made = [line for line in program.splitlines() if f"= {stacked}" in line]
    assert made and all("parameter(" in line for line in made)


def test_guidance_of_one_is_no_guidance(params, expected):
    assert not dataclasses.replace(PLAIN, guidance_scale=1.0).guided
    # The least float above 1 takes the path of two streams, with a weight of 1 in float32.
    scale = float(np.nextafter(1.0, 2.0))
    sample = compiled(dataclasses.replace(PLAIN, guidance_scale=scale, guidance_schedule="linear"))
    two_streams = sample(params, RNG, LABEL, Shift(jnp.zeros((LENGTH, WIDTH))), 0)
    np.testing.assert_array_equal(two_streams.tokens.codes, expected.tokens.codes)
    np.testing.assert_allclose(
        two_streams.tokens.latents, expected.tokens.latents, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(two_streams.cond[0], expected.cond[0], rtol=1e-4, atol=1e-4)


def test_guidance_does_nothing_without_a_class(params):
    null = jnp.full_like(LABEL, NUM_CLASSES)
    sample = compiled(dataclasses.replace(PLAIN, guidance_scale=4.0))
    guided = sample(params, RNG, null, IDENTITY, 0)
    alone = plain(params, RNG, null, IDENTITY, 0)
    np.testing.assert_array_equal(guided.tokens.codes, alone.tokens.codes)
    np.testing.assert_allclose(guided.tokens.latents, alone.tokens.latents, rtol=1e-4, atol=1e-4)
    classes = sample(params, RNG, LABEL, IDENTITY, 0)
    assert np.any(classes.tokens.codes != plain(params, RNG, LABEL, IDENTITY, 0).tokens.codes)


@pytest.mark.slow
def test_one_device_and_eight_draw_the_same(params):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    init = functools.partial(JOINT.init, method=Joint.touch_all)
    boxed = jax.eval_shape(init, RNG, LABEL)["params"]
    places = sharding.tree_shardings(boxed, mesh)
    joint_params = {name: params[name] for name in boxed}
    assert any(place.spec != () for place in jax.tree.leaves(places))
    label = jnp.arange(8) % NUM_CLASSES
    alone = plain(joint_params, RNG, label, IDENTITY, 0)

    def sample(params, rng, label):
        return PLAIN(params, rng, label, refiner=IDENTITY).tokens

    spread = sharding.on_mesh(sample, mesh)(
        jax.device_put(joint_params, places), RNG, sharding.put_batch(np.asarray(label), mesh)
    )
    assert len(spread.codes.sharding.device_set) == 8
    np.testing.assert_array_equal(spread.codes, alone.tokens.codes)
    np.testing.assert_allclose(spread.latents, alone.tokens.latents, rtol=1e-5, atol=1e-5)


def test_a_warm_start_follows_the_law_of_the_code(params):
    process = PROCESS.respace(schedule.trailing_timesteps(1000, 1, start=0.4))
    sampler = causal.CausalSampler(JOINT, solvers.Solver(process, "ddim"), warm=True)
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(NUM_CODES, CHANNELS))
    cholesky = np.tril(rng.normal(size=(NUM_CODES, CHANNELS, CHANNELS)))
    law = types.CodeLaw(jnp.asarray(mean, jnp.float32), jnp.asarray(cholesky, jnp.float32))
    # A code head that answers zero draws codes evenly; a denoiser that answers zero sees no noise,
    # so what the solver adds stays: variance 1 / kept - 1.
    silent = jax.tree.map(jnp.zeros_like, params)
    label = jnp.zeros(1500, jnp.int32)
    tokens = jax.jit(
        lambda rng: sampler(silent, rng, label, refiner=IDENTITY, code_law=law).tokens
    )(RNG)
    latents, codes = np.asarray(tokens.latents).reshape(-1, CHANNELS), np.ravel(tokens.codes)
    added = (1 / PROCESS.alphas_cumprod[399] - 1) * np.eye(CHANNELS)
    for code in range(NUM_CODES):
        rows = latents[codes == code]
        covariance = cholesky[code] @ cholesky[code].T + added
        std = np.sqrt(np.diag(covariance))
        error = (rows.mean(0) - mean[code]) / std
        assert np.all(np.abs(error) < 4.5 / np.sqrt(len(rows)))
        # Errors of a sample covariance are at most sqrt(2 / n) in units of the deviations.
        error = (np.cov(rows.T) - covariance) / np.outer(std, std)
        assert np.all(np.abs(error) < 4.5 * np.sqrt(2 / len(rows)))


SCALE, TEMPERATURE, TOP_K = 3.0, 0.8, 8


@functools.partial(jax.jit, static_argnames="split")
def drawn_window(params, windows, position, *, split):
    """The window at a position, all recomputed from the first; drawn by the samplers' rule."""

    def logits(label):
        cond = teacher_forced(CODES_ONLY, params, windows, label)[:, position]
        rows = CODES_ONLY.apply({"params": params}, cond, method=Joint.slots)
        return CODES_ONLY.apply({"params": params}, rows, method=Joint.logits)

    labels = jnp.stack([LABEL, jnp.full_like(LABEL, NUM_CLASSES)])
    conditional, unconditional = jax.vmap(logits)(labels)
    weight = 1.0 + (SCALE - 1.0) * (position + 1) / LENGTH
    logits = unconditional + weight * (conditional - unconditional)
    logits = filters.filter_logits(logits / TEMPERATURE, top_k=TOP_K)

    rngs = sampled_lib.row_rngs(RNG, len(LABEL), 0)
    rngs = jax.vmap(jax.random.fold_in, (0, None))(rngs, position)
    if split:  # one half for the codes, one for the latents
        rngs = jax.vmap(jax.random.split)(rngs)[:, 0]
    return jax.vmap(jax.random.categorical)(rngs, logits)


def base(**choices):
    return causal.CausalSampler(
        CODES_ONLY,
        None,
        guidance_scale=SCALE,
        guidance_schedule="linear",
        code_temperature=TEMPERATURE,
        top_k=TOP_K,
        **choices,
    )


def test_feeding_drafts_back_is_algorithm_one(params):
    sampled = compiled(base(drafts="feed"))(params, RNG, LABEL, IDENTITY, 0)
    windows = np.full((len(LABEL), LENGTH, WINDOW), PAD)
    for position in range(LENGTH):
        window = np.asarray(drawn_window(params, jnp.asarray(windows), position, split=True))
        np.testing.assert_array_equal(sampled.drafts[:, position], window)
        inside = min(WINDOW, LENGTH - position)
        windows[:, position, :inside] = window[:, :inside]
    np.testing.assert_array_equal(sampled.tokens.codes, windows[..., 0])


@pytest.mark.parametrize(("step", "drafts"), [(1, "feed"), (2, "feed"), (4, "off")])
def test_a_stride_emits_the_head_of_each_window(params, step, drafts):
    sampler = stride.StrideSampler(base(drafts=drafts), step)
    codes = compiled(sampler)(params, RNG, LABEL, IDENTITY, 0).tokens.codes
    assert codes.shape == (len(LABEL), LENGTH)
    windows = np.full((len(LABEL), LENGTH + WINDOW, WINDOW), PAD)
    for position in range(0, LENGTH, step):
        fed = jnp.asarray(windows[:, :LENGTH])
        window = np.asarray(drawn_window(params, fed, position, split=False))
        windows[:, position : position + step, 0] = window[:, :step]
        if drafts == "feed":  # the last code emitted carries what was drawn beyond it
            last = position + step - 1
            beyond = window[:, step : max(step, LENGTH - position)]
            windows[:, last, 1 : 1 + beyond.shape[1]] = beyond
    np.testing.assert_array_equal(codes, windows[:, :LENGTH, 0])


def test_linear_guidance_grows_from_one_to_its_scale():
    weights = [filters.guidance_weight(3.0, "linear", (i + 1) / 4) for i in range(4)]
    np.testing.assert_allclose(weights, [1.5, 2.0, 2.5, 3.0])
    assert filters.guidance_weight(3.0, "constant", 0.25) == 3.0


def test_power_cosine_guidance_rises_from_one_to_its_scale():
    shares = np.linspace(0.0, 1.0, 9)
    weights = np.array([filters.power_cosine_weight(5.0, 2.0, share) for share in shares])
    np.testing.assert_allclose(weights[[0, -1]], [1.0, 5.0], rtol=1e-6)
    assert np.all(np.diff(weights) > 0)
    np.testing.assert_allclose(filters.power_cosine_weight(5.0, 1.0, 0.5), 3.0, rtol=1e-6)
    for share in shares:  # the power 0 is constant guidance, from the first step on
        np.testing.assert_allclose(filters.power_cosine_weight(5.0, 0.0, share), 5.0, rtol=1e-6)


@pytest.mark.slow
def test_guidance_ends_where_it_is_told_to(params):
    def codes(positions, scale=SCALE):
        sampler = dataclasses.replace(
            base(), guidance_scale=scale, guidance_schedule="constant", guided_positions=positions
        )
        return np.asarray(compiled(sampler)(params, RNG, LABEL, IDENTITY, 0).tokens.codes)

    always, half, never = codes(None), codes(3), codes(0)
    np.testing.assert_array_equal(codes(LENGTH), always)
    np.testing.assert_array_equal(half[:, :3], always[:, :3])
    assert np.any(half != always)
    np.testing.assert_array_equal(never, codes(None, scale=1.0))


def test_guidance_extrapolates_from_the_unconditional_rows():
    both = jnp.array([[1.0, 2.0], [0.5, -1.0]])
    np.testing.assert_allclose(filters.guide(both, jnp.asarray(3.0)), [[2.0, 8.0]])
    np.testing.assert_array_equal(filters.guide(both, None), both)


def kept(logits, **choices):
    return np.isfinite(filters.filter_logits(jnp.asarray(logits), **choices)).tolist()


def test_filters_keep_the_likely_codes():
    logits = np.log([0.1, 0.4, 0.2, 0.3]).astype(np.float32)
    for whole in ({}, dict(top_k=4), dict(top_k=9), dict(top_p=1.0)):
        np.testing.assert_array_equal(filters.filter_logits(jnp.asarray(logits), **whole), logits)
    assert kept(logits, top_k=1) == [False, True, False, False]
    assert kept(logits, top_k=2) == [False, True, False, True]
    assert kept(np.zeros(4, np.float32), top_k=2) == [True] * 4  # ties stay
    assert kept(logits, top_p=0.01) == [False, True, False, False]
    assert kept(logits, top_p=0.5) == [False, True, False, True]  # the crossing code stays
    assert kept(logits, top_p=0.95) == [True] * 4
    # The mass is that of what top_k left: 4 / 7 and 3 / 7.
    assert kept(logits, top_k=2, top_p=0.5) == [False, True, False, False]
    # Half of the largest is 0.2, which is not below it by more than rounding.
    assert kept(logits, min_p=0.51) == [False, True, False, True]
    assert kept(logits, min_p=0.49) == [False, True, True, True]
    assert kept(logits, min_p=1.0) == [False, True, False, False]
    assert kept(logits, min_p=0.0) == kept(logits, min_p=1e-6) == [True] * 4
    assert kept(logits + 5.0, min_p=0.3) == [False, True, True, True]  # a share of the largest
    left = np.asarray(filters.filter_logits(jnp.asarray(logits), top_k=2))
    np.testing.assert_array_equal(left[[1, 3]], logits[[1, 3]])


def test_the_kth_largest_is_that_of_a_sorted_row():
    rng = np.random.default_rng(0)
    inf, least = np.inf, np.finfo(np.float32).smallest_normal
    rows = [rng.normal(size=32), -np.exp(9 * rng.normal(size=32)), rng.integers(-2, 3, size=32)]
    rows += [np.where(rng.random(32) < 0.8, -inf, 1.0), np.full(32, -inf), np.full(32, -3.0)]
    rows += [np.resize([0.0, -0.0, least, -least, inf, -inf, 3e38, -3e38], 32)]
    logits = jnp.asarray(np.stack(rows), jnp.float32)
    ranked = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    for k in (1, 2, 3, 8, 31, 32):
        np.testing.assert_array_equal(filters.kth_largest(logits, k), ranked[:, k - 1 : k])
        cut = jnp.where(logits < ranked[:, k - 1 : k], -inf, logits)
        left = filters.filter_logits(logits, top_k=k)
        np.testing.assert_array_equal(left.view(jnp.int32), cut.view(jnp.int32))
    half = logits.astype(jnp.bfloat16)
    expected = jnp.flip(jnp.sort(half, axis=-1), axis=-1)[:, 7:8]
    np.testing.assert_array_equal(filters.kth_largest(half, 8), expected)


def test_impossible_choices_are_refused():
    with pytest.raises(ValueError, match="drafts 'some' is not one of"):
        causal.CausalSampler(JOINT, SOLVER, drafts="some")
    with pytest.raises(ValueError, match="guidance_schedule 'cosine' is not one of"):
        causal.CausalSampler(JOINT, SOLVER, guidance_schedule="cosine")
    with pytest.raises(ValueError, match=r"code_temperature 0\.0 must be positive"):
        causal.CausalSampler(JOINT, SOLVER, code_temperature=0.0)
    with pytest.raises(ValueError, match="a warm start needs"):
        causal.CausalSampler(CODES_ONLY, None, warm=True)
    with pytest.raises(ValueError, match="latents are drawn 1 a step"):
        stride.StrideSampler(PLAIN, 1)
    for step in (0, WINDOW + 1):
        with pytest.raises(ValueError, match=f"stride {step} must be from 1 to the window, 4"):
            stride.StrideSampler(base(), step)
    with pytest.raises(ValueError, match="no drafts to show"):
        stride.StrideSampler(base(drafts="draw"), 2)
