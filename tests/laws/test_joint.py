"""The losses of codes and latents together: what each trains, and what each may know."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from arcond_jax import types
from arcond_jax.diffusion import schedule
from arcond_jax.models import (
    causal,
    diffusion_head,
    gpt,
    joint,
    llamagen,
    losses,
    tensorar,
    windows,
)

NUM_CODES, NUM_CLASSES, CHANNELS, WIDTH, LENGTH, BATCH = 12, 3, 4, 32, 4, 3
BACKBONE = gpt.GPT(depth=2, width=WIDTH, num_heads=2, grid=(2, 2), mlp_hidden=48)
HEAD = diffusion_head.DiffusionHead(channels=CHANNELS, depth=1, width=16)
PROCESS = schedule.Schedule.cosine()
WINDOW = 3

SHARED = dict(backbone=BACKBONE, num_classes=NUM_CLASSES)
IN_WINDOWS = dict(window=WINDOW, num_heads=2, depth=1, mlp_ratio=0)

LATENTS_ONLY = joint.Joint(**SHARED, head=HEAD)
JOINT = joint.Joint(**SHARED, head=HEAD, num_codes=NUM_CODES)
LLAMAGEN = llamagen.LlamaGen(**SHARED, num_codes=NUM_CODES)
CODES_ONLY = tensorar.Windowed(inner=LLAMAGEN, **IN_WINDOWS)
WINDOWED = tensorar.Windowed(inner=JOINT, **IN_WINDOWS)


def generator(network, *, tensor=None, diffusion=None, **options):
    """With the losses of codes and of latents whose options are given."""
    parts = []
    if tensor is not None:
        parts.append(losses.CodeLoss(**tensor))
    if diffusion is not None:
        parts.append(losses.LatentLoss(PROCESS, **diffusion))
    return causal.Generator(network, tuple(parts), **{"label_dropout": 0.0} | options)


def init(network):
    return lambda rng: nn.unbox(causal.Generator(network, ()).init(rng))


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(jax.eval_shape(init(WINDOWED), RNG))


@pytest.fixture(scope="module")
def joint_params(params):
    return {name: value for name, value in params.items() if "window" not in name}


@pytest.fixture(scope="module")
def tokens():
    return types.Tokens(
        latents=jax.random.normal(jax.random.key(1), (BATCH, LENGTH, CHANNELS)),
        codes=jax.random.randint(jax.random.key(2), (BATCH, LENGTH), 0, NUM_CODES),
    )


LABEL = jnp.array([0, 2, 1])
RNG = jax.random.key(3)


WEIGHTS = dict(diffusion=dict(weight=0.7), tensor=dict(weight=0.2))
PLAIN = generator(JOINT, **WEIGHTS)


def largest(tree):
    return max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree))


def test_without_codes_the_joint_model_is_the_diffusion_model(joint_params, tokens):
    single = generator(LATENTS_ONLY, diffusion={}, label_dropout=0.1)
    both = generator(JOINT, diffusion={}, tensor=dict(weight=0.0), label_dropout=0.1)
    single_params = {k: v for k, v in joint_params.items() if not k.startswith("code")}
    shapes = jax.eval_shape(init(LATENTS_ONLY), RNG)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, single_params)

    silent = jax.tree.map(jnp.zeros_like, {k: joint_params[k] for k in ("code_embed", "code_cond")})

    @jax.jit
    def values(single_params, joint_params):
        alone = single.loss(single_params, types.Tokens(latents=tokens.latents), LABEL, RNG)
        return alone[0], both.loss(joint_params, tokens, LABEL, RNG)[0]

    np.testing.assert_allclose(*values(single_params, joint_params | silent), rtol=1e-6)


def test_loss_is_linear_in_its_weights(joint_params, tokens):
    generators = [
        generator(JOINT, diffusion=dict(weight=a), tensor=dict(weight=b))
        for a, b in ((1.0, 0.0), (0.0, 1.0), (0.7, 0.2))
    ]

    @jax.jit
    def values(params):
        return [generator.loss(params, tokens, LABEL, RNG) for generator in generators]

    (diffusion, metrics), (tensor, _), (both, _) = values(joint_params)
    assert min(diffusion, tensor) > 0.1
    np.testing.assert_allclose(both, 0.7 * diffusion + 0.2 * tensor, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], diffusion)
    np.testing.assert_allclose(metrics["loss_diffusion"], diffusion, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_tensor"], tensor, rtol=1e-6)


@pytest.mark.slow
def test_each_loss_trains_its_own_head_and_both_train_the_backbone(joint_params, tokens):
    def parts(params):
        metrics = PLAIN.loss(params, tokens, LABEL, RNG)[1]
        return jnp.stack([metrics["loss_diffusion"], metrics["loss_tensor"]])

    jacobian = jax.jit(jax.jacrev(parts))(joint_params)
    of_diffusion, of_tensor = (jax.tree.map(lambda x, i=i: x[i], jacobian) for i in (0, 1))
    # The cross-entropy must not see the code it predicts: nothing flows back through code_cond.
    for name in ("denoiser", "code_cond"):
        assert largest(of_tensor[name]) == 0.0 < largest(of_diffusion[name])
    assert largest(of_diffusion["code_head"]) == 0.0 < largest(of_tensor["code_head"])
    for name in ("trunk", "latent_in", "code_embed", "class_embed", "head_position"):
        assert largest(of_diffusion[name]) > 0.0 and largest(of_tensor[name]) > 0.0
    # Which codes stand in the data decides which rows of code_cond learn.
    rows = np.abs(of_diffusion["code_cond"]["table"]).max(-1)
    np.testing.assert_array_equal(rows > 0, np.isin(np.arange(NUM_CODES + 1), tokens.codes))


def test_unknown_codes_share_one_row(joint_params, tokens):
    never_told = generator(JOINT, diffusion=dict(code_dropout=1.0), tensor={})

    def loss(code_cond):
        return never_told.loss(joint_params | {"code_cond": code_cond}, tokens, LABEL, RNG)[0]

    gradient = jax.jit(jax.grad(loss))(joint_params["code_cond"])["table"]
    rows = np.abs(gradient).max(-1)
    assert not rows[:NUM_CODES].any() and rows[NUM_CODES] > 0


def test_conditions_follow_from_the_past_alone(joint_params, tokens):
    direction = jax.random.normal(jax.random.key(4), (WIDTH,))

    def conditions(latents, codes):
        tokens = types.Tokens(latents=latents[None], codes=codes[None])
        cond = PLAIN.conditions(joint_params, tokens, LABEL[:1])[0] @ direction
        return cond, cond

    latents, codes = tokens.latents[0], tokens.codes[0]
    jacobian = jax.jit(jax.jacrev(conditions, has_aux=True))
    gradient, plain = jacobian(latents, codes)
    gradient = np.abs(gradient).max(-1)
    assert np.all(gradient[np.triu_indices(LENGTH)] == 0.0)
    assert np.all(gradient[np.tril_indices(LENGTH, -1)] > 1e-5)
    for j in range(LENGTH):
        other = jacobian(latents, codes.at[j].set((codes[j] + 1) % NUM_CODES))[1]
        change = np.abs(other - plain)
        assert np.all(change[: j + 1] == 0.0) and np.all(change[j + 1 :] > 1e-5)


WINDOWED_PLAIN = generator(WINDOWED, diffusion={}, tensor=dict(weight=0.3, draft_weight=0.25))
ENTRIES = ("cross_entropy", "cross_entropy/draft_1", "cross_entropy/draft_2")
windowed_loss = jax.jit(WINDOWED_PLAIN.loss)


def test_cross_entropy_starts_at_that_of_a_uniform_guess(params, tokens):
    fresh = jax.jit(lambda rng: init(WINDOWED)(rng)["code_head"])(RNG)
    metrics = windowed_loss(params | {"code_head": fresh}, tokens, LABEL, RNG)[1]
    for name in ENTRIES:
        np.testing.assert_allclose(metrics[name], np.log(NUM_CODES), rtol=1e-6)


def test_cross_entropy_equals_the_naive_one_over_all_logits(params, tokens):
    total, metrics = windowed_loss(params, tokens, LABEL, RNG)

    @jax.jit
    def all_logits(params):
        apply = functools.partial(WINDOWED.apply, {"params": params})
        codes = tokens.codes[..., None]
        token, at = causal.given(codes, tokens.latents, WINDOW), jnp.arange(LENGTH)
        cond = apply(token, LABEL, at, method=causal.teacher_forced)
        rows = apply(cond, jnp.zeros((1, WINDOW), int), method="rows")
        return apply(rows, windows.of(codes, WINDOW), method="all_factor_logits")[0]

    log_p = np.asarray(jax.nn.log_softmax(all_logits(params)))
    naive = []
    for entry, name in enumerate(ENTRIES):
        picked = [
            log_p[i, position, entry, tokens.codes[i, position + entry]]
            for i in range(BATCH)
            for position in range(LENGTH - entry)  # beyond the end there is nothing to predict
        ]
        naive.append(-np.mean(picked))
        np.testing.assert_allclose(metrics[name], naive[-1], rtol=1e-5)
    np.testing.assert_allclose(
        metrics["loss_tensor"], naive[0] + 0.25 * np.mean(naive[1:]), rtol=1e-5
    )
    np.testing.assert_allclose(
        total, metrics["loss_diffusion"] + 0.3 * metrics["loss_tensor"], rtol=1e-6
    )


@pytest.mark.long
def test_a_few_positions_at_a_time_give_the_same_loss_and_gradient(monkeypatch, params, tokens):
    codes_alone = generator(CODES_ONLY, tensor=dict(draft_weight=0.25))

    def run(params):
        return codes_alone.loss(params, tokens, LABEL, RNG)[0]

    whole = jax.jit(jax.value_and_grad(run))(params)
    monkeypatch.setattr(losses, "ROWS", 3 * BATCH)  # 2 positions, or 1, of an even number
    pieces = jax.jit(jax.value_and_grad(lambda params: run(params)))(params)
    np.testing.assert_allclose(pieces[0], whole[0], rtol=1e-6)
    for ours, theirs in zip(*map(jax.tree.leaves, (pieces[1], whole[1])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_dropped_label_is_the_null_class(joint_params, tokens):
    always = generator(JOINT, **WEIGHTS, label_dropout=1.0)

    @jax.jit
    def values(params):
        null = jnp.full(BATCH, NUM_CLASSES)
        pairs = ((always, LABEL), (PLAIN, null), (PLAIN, LABEL))
        return [g.loss(params, tokens, label, RNG)[1]["loss_tensor"] for g, label in pairs]

    dropped, null, kept = values(joint_params)
    np.testing.assert_allclose(dropped, null, rtol=1e-6)
    assert abs(null - kept) > 1e-4


def codes_loss(params, tokens, **network_options):
    """A function of the random key, which codes alone need for dropout only, and of the label."""
    single = generator(LLAMAGEN.clone(**network_options), tensor={})
    return jax.jit(lambda rng, label: single.loss(params, tokens, label, rng)[0])


def test_dropout_of_the_backbone_follows_the_rng_of_the_loss(joint_params, tokens):
    other = jax.random.key(4)
    plain = codes_loss(joint_params, tokens)
    assert plain(RNG, LABEL) == plain(other, LABEL)
    dropping = codes_loss(joint_params, tokens, backbone=BACKBONE.clone(dropout=0.5))
    assert abs(dropping(RNG, LABEL) - dropping(other, LABEL)) > 1e-3


def test_token_dropout_reaches_the_class_in_training_alone(joint_params, tokens):
    blank = codes_loss(joint_params, tokens, token_dropout=1.0)
    # Fed nothing, not even its class, the network has one guess for all.
    assert blank(RNG, LABEL) == blank(RNG, LABEL[::-1])

    def program(network):
        conditions = generator(network).conditions
        return jax.jit(lambda params: conditions(params, tokens, LABEL)).lower(joint_params)

    dropping = program(JOINT.clone(token_dropout=1.0))
    assert dropping.as_text() == program(JOINT).as_text()


CODEBOOK = np.random.default_rng(0).normal(size=(NUM_CODES, 3)).astype(np.float32)


@pytest.mark.slow
def test_every_kind_of_draft_is_its_own_loss(params, tokens):
    variants = [
        {},
        dict(drafts="noised", noise="self"),
        dict(drafts="noised", noise="codebook", codebook=CODEBOOK),
        dict(drafts="random"),
    ]
    values = []
    for variant in variants:
        drafts = windows.Drafts(noise_schedule="sine", nested=False, **variant)
        loss = generator(CODES_ONLY, tensor={}, drafts=drafts).loss
        values.append(float(jax.jit(loss)(params, tokens, LABEL, RNG)[0]))
    assert np.all(np.isfinite(values))
    assert np.min(np.diff(np.sort(values))) > 1e-6


def test_copies_are_noised_independently(joint_params, tokens):
    num_copies = 256
    copying = generator(JOINT, diffusion=dict(num_copies=num_copies), tensor={})
    # A head that answers zero: the error is the mean square of all the noise drawn.
    output = jax.tree.map(jnp.zeros_like, joint_params["denoiser"]["output"])
    params = joint_params | {"denoiser": joint_params["denoiser"] | {"output": output}}
    mse = jax.jit(lambda: copying.loss(params, tokens, LABEL, RNG)[1]["diffusion/mse"])()
    num_draws = num_copies * BATCH * LENGTH * CHANNELS
    assert 1e-6 < abs(mse - 1.0) < 4 * np.sqrt(2 / num_draws)


def test_loss_needs_the_tokens_of_its_network(joint_params, tokens):
    for lacking, what in (
        (types.Tokens(latents=tokens.latents), "codes"),
        (types.Tokens(codes=tokens.codes), "latents"),
    ):
        with pytest.raises(
            ValueError, match=f"the model predicts {what}, and these tokens hold none"
        ):
            PLAIN.loss(joint_params, lacking, LABEL, RNG)


def test_choices_that_do_not_exist_are_refused(params, tokens):
    for name in ("drafts", "noise", "noise_schedule"):
        with pytest.raises(ValueError, match=f"{name} 'cubic' is not one of"):
            windows.Drafts(**{name: "cubic"})
    drafts = windows.Drafts("noised", "codebook")
    with pytest.raises(ValueError, match="noise 'codebook' needs a tokenizer with one codebook"):
        generator(CODES_ONLY, tensor={}, drafts=drafts).loss(params, tokens, LABEL, RNG)
