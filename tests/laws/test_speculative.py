"""Speculative sampling against the exact law of the loop without drafts, and what it is made of."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny

from arcond_jax import types
from arcond_jax.models import causal, gpt, llamagen, magvit2, rar, tensorar
from arcond_jax.nn import attention
from arcond_jax.nn import factors as factors_lib
from arcond_jax.parallel import compiled as compiled_lib
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.parallel import processes
from arcond_jax.sampling import guidance as guidance_lib
from arcond_jax.sampling import heads, raster, speculative
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import refiners

LENGTH, NUM_CLASSES, ROWS = 4, 2, 4096
MANY = jnp.arange(64) % NUM_CLASSES
RNG, IDENTITY = jax.random.key(3), refiners.Identity()
GRID = dict(grid=(2, 2), depth=1, width=16, num_heads=2, mlp_hidden=24)
LLAMAGEN = llamagen.LlamaGen(backbone=gpt.GPT(**GRID), num_classes=NUM_CLASSES, num_codes=3)
CAPTIONED = llamagen.LlamaGen(
    backbone=gpt.GPT(**GRID, num_prefix=3), num_classes=None, num_codes=3, caption_width=8
)
MAGVIT2 = magvit2.MAGVIT2(
    backbone=gpt.GPT(**GRID), num_classes=NUM_CLASSES, factor_sizes=(2, 2), intra_depth=1
)
RAR = rar.RAR(**GRID, num_codes=3, num_classes=NUM_CLASSES)


def in_grid(network, *grid):
    """The network on another grid."""
    if isinstance(network, rar.RAR):
        return network.clone(grid=grid)
    return network.clone(backbone=network.backbone.clone(grid=grid))


BLOCKS = dict(num_heads=2, depth=1, mlp_ratio=0)
AROUND = {
    "windowed": lambda inner: tensorar.Windowed(inner=inner, window=3, **BLOCKS),
    "drafter": lambda inner: tensorar.Drafter(inner=inner, num_drafts=2, **BLOCKS),
}
PLAIN = raster.Raster(AROUND["windowed"](LLAMAGEN), (heads.Codes(),))
GUIDED = raster.Raster(
    PLAIN.network,
    (heads.Codes(temperature=0.8, top_k=2),),
    guidance_lib.Guidance(2.0, schedule="linear"),
)


@functools.cache
def params_of(network, scale=0.35):
    shapes = jax.eval_shape(causal.Generator(network, ()).init, jax.random.key(0))
    return tiny.random_params(shapes, scale)


@functools.cache
def compiled(sampler):
    @jax.jit
    def sample(params, rng, prompt, first_row, refiner):
        drawn = sampler(params, rng, prompt, refiner=refiner, first_row=first_row)
        return dataclasses.replace(drawn, refiner_state=None)

    return sample


def run(sampler, prompt, first_row=0, refiner=IDENTITY):
    params = params_of(sampler.network)
    return compiled(sampler)(params, RNG, prompt, first_row, refiner)


def exact_law(base):
    """The probability of every sequence of codes for class 0, by teacher forcing."""
    network, head, guidance = base.network, base.heads[0], base.guidance
    sizes = network.factor_sizes
    num_codes, length = int(np.prod(sizes)), network.length
    every = np.array(list(itertools.product(range(num_codes), repeat=length)))
    codes = factors_lib.split(jnp.asarray(every), sizes)
    prompts = guidance.prompts(network, jnp.zeros(len(every), int))

    @jax.jit
    def log_law(params):
        at = jnp.broadcast_to(jnp.arange(length), every.shape)
        place = heads.Place(network, params, guidance, at)
        token = jax.tree.map(guidance.both, causal.given(codes, None, network.window))
        cond = network.apply(
            {"params": params}, token, prompts, at[0], method=causal.teacher_forced
        )
        rows = place.apply(cond, guidance.both(at[..., None]), method="rows")[..., 0, :]
        logits = place.apply(rows, guidance.both(codes), method="all_factor_logits")
        total = 0.0
        for i, x in enumerate(logits):
            law = jax.nn.log_softmax(head.law(place, x, i))
            total += jnp.take_along_axis(law, codes[..., i, None], axis=-1).sum((1, 2))
        return total

    law = np.exp(np.asarray(log_law(params_of(network)), np.float64))
    np.testing.assert_allclose(law.sum(), 1.0, rtol=1e-5)
    return law / law.sum()


def chi_square(base, sampler, batches=5):
    """The p value of samples of class 0 under the law of the loop without drafts."""
    law, network = exact_law(base), base.network
    place = int(np.prod(network.factor_sizes)) ** np.arange(network.length)[::-1]
    counts, label = np.zeros(len(law)), jnp.zeros(ROWS, int)
    for batch in range(batches):
        drawn = run(sampler, label, batch * ROWS)
        counts += np.bincount(np.asarray(drawn.tokens.codes) @ place, minlength=len(law))
    if sampler.relaxed == 1.0:  # rows went on each at its own pace
        assert len(np.unique(drawn.emitted, axis=0)) > 2
    assert np.all(counts[law == 0] == 0)
    expected = counts.sum() * law
    few = expected < 5  # they count as one
    counts, expected = (
        np.append(x[~few], x[few].sum()) for x in (counts, np.where(law > 0, expected, 0))
    )
    kept = expected > 0
    return scipy.stats.chisquare(counts[kept], expected[kept]).pvalue


LAWS = {
    "guided": GUIDED,
    "magvit2": dataclasses.replace(PLAIN, network=AROUND["drafter"](MAGVIT2)),
}
SLOW_LAWS = {
    "windowed": PLAIN,
    "drafter_guided": dataclasses.replace(GUIDED, network=AROUND["drafter"](LLAMAGEN)),
    "drafter": dataclasses.replace(PLAIN, network=AROUND["drafter"](LLAMAGEN)),
    "min_p": dataclasses.replace(
        PLAIN,
        heads=(heads.Codes(temperature=0.9, min_p=0.1),),
        guidance=guidance_lib.Guidance(1.5, schedule="power_cosine", power=1.0, positions=3),
    ),
    "top_p": dataclasses.replace(PLAIN, heads=(heads.Codes(top_p=0.9),)),
    "magvit2_windowed_guided": dataclasses.replace(
        PLAIN,
        network=AROUND["windowed"](MAGVIT2),
        heads=(heads.Codes(temperature=0.8, later_temperature=1.2),),
        guidance=guidance_lib.Guidance(2.0, later_scale=1.5, schedule="linear"),
    ),
    "longer": dataclasses.replace(
        PLAIN,
        network=AROUND["windowed"](in_grid(LLAMAGEN, 2, 3).clone(num_codes=2)),
    ),
    "rar": dataclasses.replace(PLAIN, network=AROUND["windowed"](RAR)),
    "rar_drafter_guided": dataclasses.replace(GUIDED, network=AROUND["drafter"](RAR)),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [*LAWS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_LAWS)]
)
def test_samples_follow_the_law_of_the_loop_without_drafts(name):
    base = (LAWS | SLOW_LAWS)[name]
    p_value = chi_square(base, speculative.Speculative(base))
    print(f"{name}: p = {p_value:.3f}")
    assert p_value > 1e-3


@pytest.mark.slow
def test_the_loop_without_drafts_follows_the_law_itself():
    law = exact_law(PLAIN)
    counts = np.zeros(len(law))
    for batch in range(5):
        codes = run(PLAIN, jnp.zeros(ROWS, int), batch * ROWS).tokens.codes
        counts += np.bincount(np.asarray(codes) @ 3 ** np.arange(LENGTH)[::-1], minlength=81)
    assert scipy.stats.chisquare(counts, counts.sum() * law).pvalue > 1e-3


@pytest.mark.long
def test_a_sampler_that_accepts_everything_is_found_out():
    sampler = speculative.Speculative(PLAIN, relaxed=1e9)
    assert chi_square(PLAIN, sampler) < 1e-9
    drawn = run(sampler, jnp.zeros(ROWS, int))
    np.testing.assert_array_equal(drawn.emitted[0], [1, 0, 1])  # the one code, and then all others
    assert np.all(drawn.variation > 0.01)


@pytest.mark.long
def test_a_row_does_not_depend_on_its_batch():
    sampler, label = speculative.Speculative(GUIDED), MANY
    together = run(sampler, label)
    assert len(np.unique(together.emitted, axis=0)) > 1
    assert together.variation is None
    for row in range(4):
        alone = run(sampler, label[row : row + 1], row)
        np.testing.assert_array_equal(alone.tokens.codes[0], together.tokens.codes[row])
        np.testing.assert_array_equal(alone.emitted[0], together.emitted[row])


def test_calls_and_codes_add_up():
    emitted = np.asarray(run(speculative.Speculative(GUIDED), MANY).emitted)
    np.testing.assert_array_equal(emitted @ np.arange(1, 4), LENGTH)
    assert np.all(emitted.sum(1) >= 2) and np.all(emitted.sum(1) <= LENGTH)


CAPTION = types.Caption(
    embedding=jax.random.normal(jax.random.key(1), (6, 3, 8)),
    valid=jnp.arange(3) >= jnp.array([0, 1, 2, 2, 1, 0])[:, None],
    given=jnp.ones(6, bool),
)
BACKBONES = {"class": LLAMAGEN, "caption": CAPTIONED, "rar": RAR, "magvit2": MAGVIT2}


@pytest.mark.long
@pytest.mark.parametrize(
    ("around", "name"),
    [
        ("drafter", "rar"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in itertools.product(AROUND, BACKBONES)
            if pair != ("drafter", "rar")
        ),
    ],
)
def test_the_likeliest_codes_are_those_of_the_loop_without_drafts(around, name):
    larger = {"magvit2": {"factor_sizes": (4, 5)}}.get(name, {"num_codes": 20})
    network = AROUND[around](in_grid(BACKBONES[name], 3, 4).clone(**larger))
    guidance = guidance_lib.Guidance(1.5)
    base = raster.Raster(network, (heads.Codes(top_k=1),), guidance)
    prompt = CAPTION if name == "caption" else jnp.arange(6) % NUM_CLASSES
    drawn = run(speculative.Speculative(base), prompt)
    np.testing.assert_array_equal(drawn.tokens.codes, run(base, prompt).tokens.codes)
    assert len(np.unique(drawn.tokens.codes)) > 2


CAUSAL = {
    "class": in_grid(LLAMAGEN, 2, 3),
    "caption": in_grid(CAPTIONED, 2, 3),
    "rar": in_grid(RAR, 2, 3),
}


@pytest.mark.parametrize("name", [pytest.param("class", marks=pytest.mark.slow), "caption", "rar"])
def test_rows_at_indices_of_their_own_are_those_of_separate_runs(name):
    network = CAUSAL[name]
    params = {"params": params_of(network)}
    prompt = CAPTION if name == "caption" else jnp.arange(6) % NUM_CLASSES
    x = jax.random.normal(RNG, (6, 8, 16))
    about = jnp.zeros((6, 2), int)

    @jax.jit
    def advance(x, prompt, cache):
        return network.apply(params, x, about[: len(x)], prompt, cache, method="advance")

    def pieces(x, prompt, pieces):
        cache = network.empty_cache(prompt, 2)
        for i in range(pieces):
            out, cache = advance(x[:, 2 * i : 2 * i + 2], prompt, cache)
        return out, cache

    _, cache = pieces(x, prompt, 2)
    next_x = x[:, 4:6]
    expected, after = advance(next_x, prompt, cache)
    same = dataclasses.replace(cache, index=jnp.full(6, cache.index))
    found, after_same = advance(next_x, prompt, same)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after_same.keys, after.keys, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after_same.index, np.full(6, after.index))

    # Taken back by a piece in some rows: what lies behind the index counts for nothing.
    index = jnp.array([4, 2, 0, 2, 4, 0])
    moved = dataclasses.replace(cache, index=index)
    found, _ = advance(next_x, prompt, moved)
    for row in range(6):
        of_row = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], prompt)
        before = jnp.concatenate([x[row : row + 1, : index[row]], next_x[row : row + 1]], axis=1)
        alone, _ = pieces(before, of_row, int(index[row]) // 2 + 1)
        np.testing.assert_allclose(found[row], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("inner", [LLAMAGEN, RAR])
def test_one_cache_for_all_layers_or_one_for_each_is_the_same(inner):
    def sampled(unroll):
        if isinstance(inner, rar.RAR):
            deep = inner.clone(depth=2, unroll=unroll)
        else:
            deep = inner.clone(backbone=inner.backbone.clone(depth=2, unroll=unroll))
        base = dataclasses.replace(GUIDED, network=AROUND["drafter"](deep))
        return run(speculative.Speculative(base), MANY)

    stacked, apart = sampled(1), sampled(2)
    np.testing.assert_array_equal(stacked.tokens.codes, apart.tokens.codes)
    np.testing.assert_array_equal(stacked.emitted, apart.emitted)
    assert len(np.unique(stacked.emitted, axis=0)) > 1


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("index", [2, [0, 3, 4]])
def test_a_layer_is_written_at_the_index_of_each_row(index, unrolled):
    sizes = dict(depth=2, batch=3, length=6, kv_heads=2, head_dim=4, dtype=jnp.float32)
    cache = attention.empty_cache(**sizes, unrolled=unrolled)
    cache = dataclasses.replace(cache, index=jnp.asarray(index))
    new = jax.random.normal(RNG, (2, 3, 2, 2, 4))
    expected = np.zeros((2, 3, 2, 6, 4))
    for layer in range(2):
        keys, values, cache = jax.jit(attention.extended)(cache, layer, new[layer], -new[layer])
        for row, start in enumerate(np.broadcast_to(index, 3)):
            written = np.swapaxes(new[layer, row], 0, 1)
            expected[layer, row, :, start : start + 2] = written
        np.testing.assert_array_equal(np.swapaxes(keys, 1, 2), expected[layer])
        np.testing.assert_array_equal(values, -keys)
    assert isinstance(cache.keys, tuple) == unrolled  # all layers had their turn
    np.testing.assert_array_equal(np.stack(list(cache.keys)), expected)
    np.testing.assert_array_equal(np.stack(list(cache.values)), -expected)


def test_drafts_verified_together_leave_the_law_and_stand_more_often():
    """All drafts of three codes: the law knows the codes before, the drafter does not."""
    rng, n, v = np.random.default_rng(0), 3, 3
    q = rng.dirichlet(np.ones(v), n)
    prefixes = itertools.chain(*(itertools.product(range(v), repeat=i) for i in range(n + 1)))
    p = {prefix: rng.dirichlet(np.ones(v)) for prefix in prefixes}
    p[0,] = q[1]  # nothing is left where both are the same
    found, together, alone = dict.fromkeys(itertools.product(range(v), repeat=n + 1), 0.0), 0.0, 0.0
    for draft in itertools.product(range(v), repeat=n):
        drafted = np.prod(q[range(n), draft])
        ratio = np.array([p[draft[:i]][x] / q[i, x] for i, x in enumerate(draft)])
        weights = speculative.block_weights(jnp.log(jnp.asarray(ratio))[None])
        laws = [w * p[draft[:i]] for i, w in enumerate(np.asarray(weights[0], float))]
        left = [np.maximum(law - before, 0).sum() for law, before in zip(laws[:n], q, strict=True)]
        chances = speculative.block_chances(weights, jnp.array(left)[None])[0]
        chances = np.concatenate([[1.0], np.asarray(chances, float)])
        passed = [c * np.prod(1.0 - chances[i + 1 :]) for i, c in enumerate(chances)]
        together += drafted * np.dot(passed, np.arange(n + 1))
        alone += drafted * np.cumprod(np.minimum(ratio, 1.0)).sum()
        for i, law in enumerate(laws):
            if i < n:
                law = np.asarray(speculative.residual(jnp.asarray(law), jnp.asarray(q[i])))
            for last in itertools.product(range(v), repeat=n + 1 - i):
                codes = draft[:i] + last
                behind = np.prod([p[codes[:j]][codes[j]] for j in range(i + 1, n + 1)])
                found[codes] += drafted * passed[i] * law[codes[i]] / law.sum() * behind
    for codes, chance in found.items():
        law = np.prod([p[codes[:i]][x] for i, x in enumerate(codes)])
        np.testing.assert_allclose(chance, law, rtol=1e-5, atol=1e-7)
    assert together > 1.01 * alone


@pytest.mark.parametrize("relaxed", [1.0, 1.5, 4.0])
def test_the_law_of_relaxed_acceptance_is_that_of_a_simulation(relaxed):
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5), 2)
    law, variation = speculative.relaxed_law(jnp.asarray(p), jnp.asarray(q), relaxed)
    law = np.asarray(law, np.float64)
    np.testing.assert_allclose(law.sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(variation, np.abs(law - p).sum() / 2, atol=1e-6)
    if relaxed == 1.0:
        np.testing.assert_allclose(law, p, atol=1e-6)
    else:
        assert variation > 0.01
    draft = rng.choice(5, size=200_000, p=q)
    accepted = rng.random(len(draft)) < np.minimum(1.0, relaxed * p / q)[draft]
    left = np.maximum(p - q, 0.0)
    drawn = np.where(accepted, draft, rng.choice(5, size=len(draft), p=left / left.sum()))
    counts = np.bincount(drawn, minlength=5)
    assert scipy.stats.chisquare(counts, len(draft) * law / law.sum()).pvalue > 1e-3


def test_where_nothing_is_left_the_law_itself_stands():
    p = jnp.array([[0.25, 0.75], [0.5, 0.5]])
    q = jnp.array([[0.25, 0.75], [0.9, 0.1]])
    np.testing.assert_allclose(speculative.residual(p, q), [[0.25, 0.75], [0.0, 1.0]])


@dataclasses.dataclass(frozen=True)
class Shift:
    """Adds a row for each slot."""

    amount: jax.Array

    def init(self, label):
        return None

    def __call__(self, cond, state, *, slot, label):
        return cond + self.amount[slot] * (1 + label[:, None]), state


jax.tree_util.register_dataclass(Shift, ["amount"], [])


@pytest.mark.long
def test_conditions_are_refined_each_at_its_slot():
    base = dataclasses.replace(GUIDED, heads=(heads.Codes(top_k=1),))
    label = jnp.arange(6) % NUM_CLASSES
    refiner = Shift(jax.random.normal(RNG, (LENGTH, 16)))
    expected = run(base, label, refiner=refiner).tokens.codes
    drawn = run(speculative.Speculative(base), label, refiner=refiner).tokens.codes
    np.testing.assert_array_equal(drawn, expected)
    still = Shift(jnp.zeros_like(refiner.amount))
    assert np.any(expected != run(base, label, refiner=still).tokens.codes)


def test_one_row_of_many_groups_has_the_map_of_its_group():
    rng = np.random.default_rng(0)
    bank = bank_lib.init_bank(1, 3, num_atoms=8, width=4)
    bank = dataclasses.replace(
        bank,
        atoms=jnp.asarray(rng.normal(size=bank.atoms.shape), jnp.float32),
        count=jnp.full_like(bank.count, 8),
    )
    calibrator = refiners.Calibrator(bank)
    class_major = jnp.repeat(jnp.arange(3), 5)
    source = jnp.asarray(rng.normal(size=(15, 4)), jnp.float32)

    @jax.jit
    def fit(source):
        state = calibrator.init(class_major)
        _, state = calibrator(source, state, slot=jnp.array(0), label=class_major)
        return calibrator.finish(state)

    fitted, label = fit(source), jnp.array([2, 0, 1, 2])
    speculative.check_refiner(fitted, label)

    @jax.jit
    def refine(cond, label):
        return fitted(cond, fitted.init(label), slot=jnp.array(0), label=label)[0]

    together = refine(source[:4], label)
    assert np.abs(together - source[:4]).max() > 0.1
    alone = jax.vmap(lambda cond, label: refine(cond[None], label[None])[0])(source[:4], label)
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5)
    for refused in (calibrator, refiners.InBatch(bank)):
        with pytest.raises(ValueError, match="rows at different positions"):
            speculative.check_refiner(refused, class_major)


def test_what_cannot_be_verified_is_refused():
    for base, message in (
        (dataclasses.replace(PLAIN, heads=(heads.Codes(drafts="feed"),)), "shows no drafts"),
        (dataclasses.replace(PLAIN, trace=True), "traces no conditions"),
        (dataclasses.replace(PLAIN, heads=PLAIN.heads * 2), "a model of codes alone"),
        (dataclasses.replace(PLAIN, network=LLAMAGEN), "a network that drafts"),
    ):
        with pytest.raises(ValueError, match=message):
            speculative.Speculative(base)
    with pytest.raises(ValueError, match=r"relaxed 0\.5 must be at least 1"):
        speculative.Speculative(PLAIN, relaxed=0.5)


@dataclasses.dataclass(frozen=True)
class Carrying(Shift):
    """A refiner that carries something."""

    def init(self, label):
        return jnp.zeros(label.shape)


def test_a_refiner_that_carries_something_is_refused():
    with pytest.raises(ValueError, match="rows at different positions"):
        speculative.check_refiner(Carrying(jnp.zeros(3)), jnp.zeros(2, int))


@pytest.mark.slow
def test_two_devices_draw_what_one_draws():
    sampler = speculative.Speculative(GUIDED)
    mesh = mesh_lib.make_mesh(data=2, devices=jax.devices()[:2])
    place = functools.partial(jax.device_put, device=mesh_lib.replicated(mesh))

    def sample(params, rng, label):
        return sampler(params, rng, label, refiner=IDENTITY)

    args = place(params_of(sampler.network)), place(RNG)
    spread = compiled_lib.Compiled(sample, mesh)(*args, processes.put_batch(np.asarray(MANY), mesh))
    assert len(spread.tokens.codes.sharding.device_set) == 2
    alone = run(sampler, MANY)
    np.testing.assert_array_equal(spread.tokens.codes, alone.tokens.codes)
    np.testing.assert_array_equal(spread.emitted, alone.emitted)
