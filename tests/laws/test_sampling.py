"""The compiled sampling loops against plain Python, one row at a time, one device at a time."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from arcond_jax import types
from arcond_jax.diffusion import schedule, solvers
from arcond_jax.models import causal, diffusion_head, gpt, joint, llamagen, tensorar
from arcond_jax.models import windows as windows_lib
from arcond_jax.parallel import compiled as compiled_lib
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.parallel import processes
from arcond_jax.sampling import filters, heads, raster, stride
from arcond_jax.sampling import guidance as guidance_lib
from arcond_jax.sampling import sampled as sampled_lib
from arcond_jax.transport import refiners

NUM_CODES, NUM_CLASSES, CHANNELS, WIDTH, LENGTH, WINDOW = 12, 3, 4, 32, 6, 4
BACKBONE = gpt.GPT(depth=2, width=WIDTH, num_heads=2, grid=(2, 3), mlp_hidden=48)
HEAD = diffusion_head.DiffusionHead(channels=CHANNELS, depth=1, width=16)
PROCESS = schedule.Schedule.cosine()
SOLVER = solvers.Solver(PROCESS.respace(schedule.trailing_timesteps(1000, 3)), clip=3.0)

SHARED = dict(backbone=BACKBONE, num_classes=NUM_CLASSES, num_codes=NUM_CODES)
IN_WINDOWS = dict(window=WINDOW, num_heads=2, depth=1, mlp_ratio=0)
JOINT = joint.Joint(**SHARED, head=HEAD)
LATENTS_ONLY = joint.Joint(**SHARED | dict(num_codes=None), head=HEAD)
WINDOWED = tensorar.Windowed(inner=JOINT, **IN_WINDOWS)
CODES_ONLY = tensorar.Windowed(inner=llamagen.LlamaGen(**SHARED), **IN_WINDOWS)

IDENTITY = refiners.Identity()
RNG = jax.random.key(5)
LABEL = jnp.array([0, 1, 2, 0, 1, 2])


@pytest.fixture(scope="module")
def params():
    """Of all networks here."""
    return tiny.random_params(jax.eval_shape(causal.Generator(WINDOWED, ()).init, RNG))


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


GUIDED = guidance_lib.Guidance(4.0)
PLAIN = raster.Raster(JOINT, (heads.Codes(), heads.Latents(SOLVER)), trace=True)
plain = compiled(PLAIN)


@pytest.fixture(scope="module")
def expected(params):
    return plain(params, RNG, LABEL, IDENTITY, 0)


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
    conditions = jax.jit(causal.Generator(network, ()).conditions)
    drawn, refined = expected.cond
    forced = conditions(params, expected.tokens, LABEL)
    np.testing.assert_allclose(drawn, forced, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(drawn, refined)


def row_rngs(*numbers):
    """The streams of all rows that these numbers lead to, one after another."""
    rngs = sampled_lib.row_rngs(RNG, len(LABEL), 0)
    for number in numbers:
        rngs = jax.vmap(jax.random.fold_in, (0, None))(rngs, number)
    return rngs


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(JOINT, id="joint"),
        pytest.param(LATENTS_ONLY, id="latents_only", marks=pytest.mark.slow),
    ],
)
def test_latents_are_the_chain_under_their_condition(params, network, expected):
    if network is LATENTS_ONLY:
        loop = dataclasses.replace(PLAIN, network=network, heads=PLAIN.heads[1:])
        expected = compiled(loop)(params, RNG, LABEL, IDENTITY, 0)
        assert expected.tokens.codes is None

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 1, 1, 0), out_axes=1)
    def latents(params, cond, codes, position):
        apply = functools.partial(network.apply, {"params": params})
        told = apply(cond, codes, method="latent_cond")
        shape = (SOLVER.num_evaluations + 2, CHANNELS)
        rngs = row_rngs(position, 1)  # after the stream of the code
        noise = jax.vmap(lambda rng: jax.random.normal(rng, shape), out_axes=1)(rngs)
        return SOLVER(lambda x, t: apply(x, t, told, method="denoise"), noise[0], noise[2:])

    chain = latents(params, expected.cond[1], expected.tokens.codes, jnp.arange(LENGTH))
    np.testing.assert_allclose(expected.tokens.latents, chain, rtol=1e-4, atol=1e-4)


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


def test_an_unrolled_backbone_draws_the_same_and_copies_neither_weights_nor_cache(params, expected):
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
    caches = [jax.eval_shape(functools.partial(x.empty_cache, LABEL)) for x in (JOINT, network)]
    assert jax.tree.leaves(caches[1].keys)[0].shape == caches[0].keys.shape[1:]
    stacked = f"f32[{','.join(map(str, caches[0].keys.shape))}]"
    assert stacked in plain.lower(params, RNG, LABEL, IDENTITY, 0).compile().as_text()
    assert stacked not in program


def test_guidance_of_one_is_no_guidance(params, expected):
    assert not PLAIN.guidance.on
    # The least float above 1 takes the path of two streams, with a weight of 1 in float32.
    guidance = guidance_lib.Guidance(float(np.nextafter(1.0, 2.0)), schedule="linear")
    sample = compiled(dataclasses.replace(PLAIN, guidance=guidance))
    two_streams = sample(params, RNG, LABEL, Shift(jnp.zeros((LENGTH, WIDTH))), 0)
    np.testing.assert_array_equal(two_streams.tokens.codes, expected.tokens.codes)
    np.testing.assert_allclose(
        two_streams.tokens.latents, expected.tokens.latents, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(two_streams.cond[0], expected.cond[0], rtol=1e-4, atol=1e-4)


guided = compiled(dataclasses.replace(PLAIN, guidance=GUIDED))


def test_guidance_does_nothing_without_a_class(params, expected):
    null = jnp.full_like(LABEL, NUM_CLASSES)
    both = guided(params, RNG, null, IDENTITY, 0)
    alone = plain(params, RNG, null, IDENTITY, 0)
    np.testing.assert_array_equal(both.tokens.codes, alone.tokens.codes)
    np.testing.assert_allclose(both.tokens.latents, alone.tokens.latents, rtol=1e-4, atol=1e-4)
    classes = guided(params, RNG, LABEL, IDENTITY, 0)
    assert np.any(classes.tokens.codes != expected.tokens.codes)


def test_a_power_of_zero_is_constant_guidance(params):
    guidance = dataclasses.replace(GUIDED, schedule="power_cosine", power=0.0)
    sample = compiled(dataclasses.replace(PLAIN, guidance=guidance))
    drawn, expected = (run(params, RNG, LABEL, IDENTITY, 0).tokens for run in (sample, guided))
    np.testing.assert_array_equal(drawn.codes, expected.codes)
    np.testing.assert_allclose(drawn.latents, expected.latents, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_one_device_and_eight_draw_the_same(params):
    mesh = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2)
    boxed = jax.eval_shape(causal.Generator(JOINT, ()).init, RNG)
    places = mesh_lib.tree_shardings(boxed, mesh)
    joint_params = {name: params[name] for name in boxed}
    assert any(place.spec != () for place in jax.tree.leaves(places))
    label = jnp.arange(8) % NUM_CLASSES
    alone = plain(joint_params, RNG, label, IDENTITY, 0)

    def sample(params, rng, label):
        return PLAIN(params, rng, label, refiner=IDENTITY).tokens

    spread = compiled_lib.Compiled(sample, mesh)(
        jax.device_put(joint_params, places), RNG, processes.put_batch(np.asarray(label), mesh)
    )
    assert len(spread.codes.sharding.device_set) == 8
    np.testing.assert_array_equal(spread.codes, alone.tokens.codes)
    np.testing.assert_allclose(spread.latents, alone.tokens.latents, rtol=1e-5, atol=1e-5)


def test_a_warm_start_follows_the_law_of_the_code(params):
    process = PROCESS.respace(schedule.trailing_timesteps(1000, 1, start=0.4))
    latents_head = heads.Latents(solvers.Solver(process, "ddim"), warm=True)
    sampler = raster.Raster(JOINT, (heads.Codes(), latents_head))
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


@jax.jit
def drawn_window(params, windows, position):
    """The window at a position, all recomputed from the first; drawn by the samplers' rule.

    `windows` holds -1 where nothing is shown.
    """
    token = types.Token(codes=jnp.maximum(windows, 0)[:, :-1, :, None], seen=windows[:, :-1] >= 0)
    apply = functools.partial(CODES_ONLY.apply, {"params": params})

    def logits(label):
        cond = apply(token, label, jnp.arange(LENGTH), method=causal.teacher_forced)
        rows = apply(cond[:, position], jnp.zeros((1, WINDOW), int), method="rows")
        return apply(rows, jnp.zeros((*rows.shape[:-1], 0), int), method="factor_logits")

    labels = jnp.stack([LABEL, jnp.full_like(LABEL, NUM_CLASSES)])
    conditional, unconditional = jax.vmap(logits)(labels)
    weight = 1.0 + (SCALE - 1.0) * (position + 1) / LENGTH
    logits = unconditional + weight * (conditional - unconditional)
    logits = filters.filter_logits(logits / TEMPERATURE, top_k=TOP_K)

    rngs = row_rngs(position, 0)  # the stream of the first factor of the code there
    return jax.vmap(jax.random.categorical)(rngs, logits)


def base(drafts="off", renoise=None, **choices):
    guidance = guidance_lib.Guidance(**dict(scale=SCALE, schedule="linear") | choices)
    head = heads.Codes(temperature=TEMPERATURE, top_k=TOP_K, drafts=drafts, renoise=renoise)
    return raster.Raster(CODES_ONLY, (head,), guidance=guidance)


NOISE = windows_lib.Noise("categorical", windows_lib.noise_levels("sqrt", WINDOW))


@jax.jit
def noised(window, position):
    """The window as it is fed back with that noise."""
    rngs, sizes = row_rngs(heads.NOISE), (NUM_CODES,)
    return NOISE(window[..., None], rngs, position, factor_sizes=sizes)[..., 0]


@functools.cache
def codes_only(drafts, step=None, renoise=None):
    """The compiled loop, or the one in strides."""
    loop = base(drafts, renoise)
    return compiled(loop if step is None else stride.StrideSampler(loop, step))


@pytest.mark.parametrize(
    "renoise",
    [
        pytest.param(None, id="plain"),
        pytest.param(NOISE, id="renoised", marks=pytest.mark.slow),
    ],
)
def test_feeding_drafts_back_is_algorithm_one(params, renoise):
    sampled = codes_only("feed", renoise=renoise)(params, RNG, LABEL, IDENTITY, 0)
    windows = np.full((len(LABEL), LENGTH, WINDOW), -1)
    for position in range(LENGTH):
        window = np.asarray(drawn_window(params, jnp.asarray(windows), position))
        np.testing.assert_array_equal(sampled.drafts[:, position], window)
        inside = min(WINDOW, LENGTH - position)
        fed = window if renoise is None else noised(window, position)
        windows[:, position, :inside] = fed[:, :inside]
    np.testing.assert_array_equal(sampled.tokens.codes, windows[..., 0])


@pytest.mark.parametrize(
    ("step", "drafts", "renoise"),
    [
        (1, "feed", None),
        pytest.param(2, "feed", NOISE, marks=pytest.mark.long),
        (4, "off", None),
    ],
)
def test_a_stride_emits_the_head_of_each_window(params, step, drafts, renoise):
    codes = codes_only(drafts, step, renoise)(params, RNG, LABEL, IDENTITY, 0).tokens.codes
    assert codes.shape == (len(LABEL), LENGTH)
    windows = np.full((len(LABEL), LENGTH + WINDOW, WINDOW), -1)
    for position in range(0, LENGTH, step):
        fed = jnp.asarray(windows[:, :LENGTH])
        window = np.asarray(drawn_window(params, fed, position))
        windows[:, position : position + step, 0] = window[:, :step]
        if drafts == "feed":  # the last code emitted carries what was drawn beyond it
            last = position + step - 1
            beyond = window[:, step : max(step, LENGTH - position)]
            windows[:, last, 1 : 1 + beyond.shape[1]] = beyond
            if renoise is not None:
                shown = windows[:, last] >= 0
                fed = noised(jnp.maximum(windows[:, last], 0), last)
                windows[:, last] = np.where(shown, fed, -1)
    np.testing.assert_array_equal(codes, windows[:, :LENGTH, 0])


@pytest.mark.parametrize("drafts", [pytest.param("off", marks=pytest.mark.slow), "feed"])
def test_a_stride_of_one_is_the_loop_without_strides(params, drafts):
    in_strides, expected = (
        sample(params, RNG, LABEL, IDENTITY, 0).tokens.codes
        for sample in (codes_only(drafts, 1), codes_only(drafts))
    )
    np.testing.assert_array_equal(in_strides, expected)


def weights(guidance, length, **options):
    """Of steps that decode one token each."""
    return np.array([guidance.weight(i, i + 1, length, **options) for i in range(length)])


def test_without_guidance_there_is_no_weight():
    assert guidance_lib.Guidance().weight(0, 1, 4) is None
    assert guidance_lib.Guidance(1.0, later_scale=1.0).weight(0, 1, 4) is None
    assert guidance_lib.Guidance(1.0, later_scale=2.0).weight(0, 1, 4) == 1.0


def test_linear_guidance_grows_from_one_to_its_scale():
    linear = guidance_lib.Guidance(3.0, schedule="linear")
    np.testing.assert_allclose(weights(linear, 4), [1.5, 2.0, 2.5, 3.0])
    assert linear.weight(1, 4, 4) == 3.0  # what counts is the end of the step
    np.testing.assert_array_equal(weights(guidance_lib.Guidance(3.0), 4), 3.0)


def test_power_cosine_guidance_rises_from_one_to_its_scale():
    def of(power, start, stop=9):
        guidance = guidance_lib.Guidance(5.0, schedule="power_cosine", power=power)
        return guidance.weight(start, stop, 8)

    rising = np.array([of(2.0, start) for start in range(9)])
    np.testing.assert_allclose(rising[[0, -1]], [1.0, 5.0], rtol=1e-6)
    assert np.all(np.diff(rising) > 0)
    np.testing.assert_allclose(of(1.0, 4), 3.0, rtol=1e-6)
    assert of(1.0, 4, 5) == of(1.0, 4, 8)  # what counts is the start of the step
    for start in range(9):  # the power 0 is constant guidance, from the first step on
        np.testing.assert_allclose(of(0.0, start), 5.0, rtol=1e-6)


def test_later_factors_may_have_a_scale_of_their_own():
    guidance = guidance_lib.Guidance(3.0, later_scale=1.5, schedule="linear", positions=3)
    np.testing.assert_allclose(weights(guidance, 4), [1.5, 2.0, 2.5, 1.0])
    np.testing.assert_allclose(weights(guidance, 4, factor=1), [1.125, 1.25, 1.375, 1.0])
    one = dataclasses.replace(guidance, later_scale=None)
    np.testing.assert_array_equal(weights(one, 4, factor=1), weights(guidance, 4))


@pytest.mark.slow
def test_guidance_ends_where_it_is_told_to(params):
    def codes(positions, scale=SCALE):
        sampler = base(scale=scale, schedule="constant", positions=positions)
        return np.asarray(compiled(sampler)(params, RNG, LABEL, IDENTITY, 0).tokens.codes)

    always, half, never = codes(None), codes(3), codes(0)
    np.testing.assert_array_equal(codes(LENGTH), always)
    np.testing.assert_array_equal(half[:, :3], always[:, :3])
    assert np.any(half != always)
    np.testing.assert_array_equal(never, codes(None, scale=1.0))


def test_guidance_leads_each_row_away_from_the_one_beside_it():
    guidance, weight = guidance_lib.Guidance(3.0), jnp.asarray(3.0)
    pairs = jnp.array([[1.0, 2.0], [0.5, -1.0], [4.0, 0.0], [4.0, 1.0]])
    guided = [[2.0, 8.0], [4.0, -2.0]]
    np.testing.assert_allclose(guidance.combine(pairs, weight), guided)
    np.testing.assert_array_equal(guidance.conditional(pairs), pairs[::2])
    np.testing.assert_array_equal(guidance.both(pairs), jnp.repeat(pairs, 2, axis=0))
    # Of a denoiser's output the first half is guided, the variance is the conditional one.
    outputs = jnp.concatenate([pairs, pairs + 10.0], axis=-1)
    expected = np.concatenate([guided, pairs[::2] + 10.0], axis=-1)
    np.testing.assert_allclose(guidance.combine_noise(outputs, weight), expected)
    np.testing.assert_array_equal(
        guidance.prompts(JOINT, LABEL[:3]), [0, NUM_CLASSES, 1, NUM_CLASSES, 2, NUM_CLASSES]
    )
    refined, state = guidance.refine(lambda cond: (-cond, "state"), pairs)
    np.testing.assert_array_equal(refined, pairs * jnp.array([-1.0, 1.0, -1.0, 1.0])[:, None])
    assert state == "state"


def test_without_guidance_rows_are_left_as_they_are():
    guidance, rows = guidance_lib.Guidance(), jnp.arange(6.0).reshape(3, 2)
    for same in (
        guidance.both(rows),
        guidance.conditional(rows),
        guidance.combine(rows, None),
        guidance.combine_noise(rows, None),
    ):
        np.testing.assert_array_equal(same, rows)
    np.testing.assert_array_equal(guidance.prompts(JOINT, LABEL), LABEL)


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
        heads.Codes(drafts="some")
    for name in ("temperature", "later_temperature"):
        with pytest.raises(ValueError, match=rf"code_{name} 0\.0 must be positive"):
            heads.Codes(**{name: 0.0})
    with pytest.raises(ValueError, match="guidance_schedule 'cosine' is not one of"):
        guidance_lib.Guidance(2.0, schedule="cosine")
    for choices in (dict(schedule="linear", power=1.0), dict(schedule="power_cosine")):
        with pytest.raises(ValueError, match="power_cosine, and it alone, has a power"):
            guidance_lib.Guidance(2.0, **choices)


def test_loops_are_refused_that_have_nothing_to_draw_from():
    for network, head, message in (
        (LATENTS_ONLY, heads.Codes(), "this network has no codes to draw"),
        (CODES_ONLY, heads.Latents(SOLVER), "this network has no latents to draw"),
        (LATENTS_ONLY, heads.Latents(SOLVER, warm=True), "a warm start needs a model with both"),
    ):
        with pytest.raises(ValueError, match=message):
            raster.Raster(network, (head,))
    with pytest.raises(ValueError, match="latents are drawn 1 a step"):
        stride.StrideSampler(PLAIN, 1)
    for step in (0, WINDOW + 1):
        with pytest.raises(ValueError, match=f"stride {step} must be from 1 to the window, 4"):
            stride.StrideSampler(base(), step)
    with pytest.raises(ValueError, match="no drafts to show"):
        stride.StrideSampler(base("draw"), 2)


def test_a_warm_start_needs_the_law_of_the_codes(params):
    loop = raster.Raster(JOINT, (heads.Codes(), heads.Latents(SOLVER, warm=True)))
    with pytest.raises(ValueError, match="a warm start needs code_law"):
        loop(params, RNG, LABEL, refiner=IDENTITY)


def test_a_categorical_draw_is_that_of_jax():
    logits = 3 * jax.random.normal(RNG, (4, 5, 300))
    logits = logits.at[0].set(-jnp.inf).at[1, :, 7].set(jnp.inf)
    for rng in jax.random.split(RNG, 20):
        drawn = filters.categorical(rng, logits)
        assert drawn.dtype == jnp.int32
        np.testing.assert_array_equal(drawn, jax.random.categorical(rng, logits))
