"""The losses of codes and latents together: what each trains, and what each may know."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from arcond_jax import types
from arcond_jax.diffusion import schedule
from arcond_jax.models import diffusion_head, gpt, tensorar
from arcond_jax.models.joint import Generator, Joint

NUM_CODES, NUM_CLASSES, CHANNELS, WIDTH, LENGTH, BATCH = 12, 3, 4, 32, 4, 3
PAD = NUM_CODES
BACKBONE = gpt.GPT(depth=2, width=WIDTH, num_heads=2, grid=(2, 2), mlp_hidden=48)
HEAD = diffusion_head.DiffusionHead(channels=CHANNELS, depth=1, width=16)
PROCESS = schedule.Schedule.cosine()
WINDOW = 3

LATENTS_ONLY = Joint(BACKBONE, NUM_CLASSES, HEAD)
JOINT = Joint(BACKBONE, NUM_CLASSES, HEAD, NUM_CODES)
IN_WINDOWS = dict(num_codes=NUM_CODES, window=WINDOW, window_depth=1, window_mlp_ratio=0)
CODES_ONLY = Joint(BACKBONE, NUM_CLASSES, **IN_WINDOWS)
WINDOWED = Joint(BACKBONE, NUM_CLASSES, HEAD, **IN_WINDOWS)


def init(network):
    return lambda rng: nn.unbox(Generator(network, PROCESS).init(rng))


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


PLAIN = Generator(JOINT, PROCESS, w_diffusion=0.7, w_tensor=0.2, label_dropout=0.0)


def largest(tree):
    return max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree))


def test_without_codes_the_joint_model_is_the_diffusion_model(joint_params, tokens):
    single = Generator(LATENTS_ONLY, PROCESS, w_tensor=0.0)
    joint = Generator(JOINT, PROCESS, w_tensor=0.0)
    single_params = {k: v for k, v in joint_params.items() if not k.startswith("code")}
    shapes = jax.eval_shape(init(LATENTS_ONLY), RNG)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, single_params)

    silent = jax.tree.map(jnp.zeros_like, {k: joint_params[k] for k in ("code_embed", "code_cond")})

    @jax.jit
    def losses(single_params, joint_params):
        alone = single.loss(single_params, types.Tokens(latents=tokens.latents), LABEL, RNG)
        return alone[0], joint.loss(joint_params, tokens, LABEL, RNG)[0]

    np.testing.assert_allclose(*losses(single_params, joint_params | silent), rtol=1e-6)


def test_loss_is_linear_in_its_weights(joint_params, tokens):
    weights = ((1.0, 0.0), (0.0, 1.0), (0.7, 0.2))
    generators = [dataclasses.replace(PLAIN, w_diffusion=a, w_tensor=b) for a, b in weights]

    @jax.jit
    def losses(params):
        return [generator.loss(params, tokens, LABEL, RNG) for generator in generators]

    (diffusion, metrics), (tensor, _), (both, _) = losses(joint_params)
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
    generator = dataclasses.replace(PLAIN, code_dropout=1.0)

    def loss(code_cond):
        return generator.loss(joint_params | {"code_cond": code_cond}, tokens, LABEL, RNG)[0]

    gradient = jax.jit(jax.grad(loss))(joint_params["code_cond"])["table"]
    rows = np.abs(gradient).max(-1)
    assert not rows[:PAD].any() and rows[PAD] > 0


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


WINDOWED_PLAIN = Generator(WINDOWED, PROCESS, label_dropout=0.0, draft_weight=0.25)
windowed_loss = jax.jit(WINDOWED_PLAIN.loss)


def test_cross_entropy_starts_at_that_of_a_uniform_guess(params, tokens):
    fresh = jax.jit(lambda rng: init(WINDOWED)(rng)["code_head"])(RNG)
    metrics = windowed_loss(params | {"code_head": fresh}, tokens, LABEL, RNG)[1]
    for slot in range(WINDOW):
        np.testing.assert_allclose(
            metrics[f"cross_entropy/slot_{slot}"], np.log(NUM_CODES), rtol=1e-6
        )


def test_cross_entropy_equals_the_naive_one_over_all_logits(params, tokens):
    total, metrics = windowed_loss(params, tokens, LABEL, RNG)

    @jax.jit
    def all_logits(params):
        apply = functools.partial(WINDOWED.apply, {"params": params})
        masked = tensorar.windows(tokens.codes, WINDOW, pad=PAD).at[..., 1:].set(PAD)
        cond = apply(tokens.latents, masked, LABEL, method=Joint.teacher_forced)
        return apply(apply(cond, method=Joint.slots), method=Joint.logits)

    log_p = np.asarray(jax.nn.log_softmax(all_logits(params)))
    naive = []
    for slot in range(WINDOW):
        picked = [
            log_p[i, position, slot, tokens.codes[i, position + slot]]
            for i in range(BATCH)
            for position in range(LENGTH - slot)  # beyond the end there is nothing to predict
        ]
        naive.append(-np.mean(picked))
        np.testing.assert_allclose(metrics[f"cross_entropy/slot_{slot}"], naive[-1], rtol=1e-5)
    np.testing.assert_allclose(
        metrics["loss_tensor"], naive[0] + 0.25 * np.mean(naive[1:]), rtol=1e-5
    )
    np.testing.assert_allclose(
        total, metrics["loss_diffusion"] + 0.3 * metrics["loss_tensor"], rtol=1e-6
    )


def test_a_dropped_label_is_the_null_class(joint_params, tokens):
    always = dataclasses.replace(PLAIN, label_dropout=1.0)

    @jax.jit
    def losses(params):
        null = jnp.full(BATCH, NUM_CLASSES)
        pairs = ((always, LABEL), (PLAIN, null), (PLAIN, LABEL))
        return [g.loss(params, tokens, label, RNG)[1]["loss_tensor"] for g, label in pairs]

    dropped, null, kept = losses(joint_params)
    np.testing.assert_allclose(dropped, null, rtol=1e-6)
    assert abs(null - kept) > 1e-4


# Of codes alone, one at a time: its loss draws nothing but dropout.
SINGLE_CODES = Generator(
    Joint(BACKBONE, NUM_CLASSES, num_codes=NUM_CODES), PROCESS, label_dropout=0.0
)


def single_codes_loss(joint_params, tokens, **network_options):
    """A function of the random key and the label."""
    network = SINGLE_CODES.network.clone(**network_options)
    generator = dataclasses.replace(SINGLE_CODES, network=network)
    table = joint_params["code_embed"]["table"][:NUM_CODES]
    params = joint_params | {"code_embed": {"table": table}}
    return jax.jit(lambda rng, label: generator.loss(params, tokens, label, rng)[0])


def test_dropout_of_the_backbone_follows_the_rng_of_the_loss(joint_params, tokens):
    other = jax.random.key(4)
    plain = single_codes_loss(joint_params, tokens)
    assert plain(RNG, LABEL) == plain(other, LABEL)
    dropping = single_codes_loss(joint_params, tokens, backbone=BACKBONE.clone(dropout=0.5))
    assert abs(dropping(RNG, LABEL) - dropping(other, LABEL)) > 1e-3


def test_token_dropout_reaches_the_class_in_training_alone(joint_params, tokens):
    blank = single_codes_loss(joint_params, tokens, token_dropout=1.0)
    # Fed nothing, not even its class, the network has one guess for all.
    assert blank(RNG, LABEL) == blank(RNG, LABEL[::-1])

    def program(network):
        def conditions(params):
            generator = dataclasses.replace(PLAIN, network=network)
            return generator.conditions(params, tokens, LABEL)

        return jax.jit(conditions).lower(joint_params).as_text()

    assert program(JOINT.clone(token_dropout=1.0)) == program(JOINT)


def test_every_kind_of_draft_is_its_own_loss(params, tokens):
    codes = types.Tokens(codes=tokens.codes)
    codebook = np.random.default_rng(0).normal(size=(NUM_CODES, 3)).astype(np.float32)
    variants = [
        {},
        dict(drafts="noised", noise="self"),
        dict(drafts="noised", noise="codebook", codebook=codebook),
        dict(drafts="random"),
    ]
    losses = []
    for variant in variants:
        generator = Generator(
            CODES_ONLY, PROCESS, label_dropout=0.0, noise_schedule="sine", nested=False, **variant
        )
        losses.append(float(jax.jit(generator.loss)(params, codes, LABEL, RNG)[0]))
    assert np.all(np.isfinite(losses))
    assert np.min(np.diff(np.sort(losses))) > 1e-6


def test_copies_are_noised_independently(joint_params, tokens):
    num_copies = 256
    generator = dataclasses.replace(PLAIN, num_copies=num_copies)
    # A head that answers zero: the error is the mean square of all the noise drawn.
    output = jax.tree.map(jnp.zeros_like, joint_params["denoiser"]["output"])
    params = joint_params | {"denoiser": joint_params["denoiser"] | {"output": output}}
    mse = jax.jit(lambda: generator.loss(params, tokens, LABEL, RNG)[1]["diffusion/mse"])()
    num_draws = num_copies * BATCH * LENGTH * CHANNELS
    assert 1e-6 < abs(mse - 1.0) < 4 * np.sqrt(2 / num_draws)


def test_choices_that_do_not_exist_are_refused():
    for name in ("drafts", "noise", "noise_schedule"):
        with pytest.raises(ValueError, match=f"{name} 'cubic' is not one of"):
            Generator(WINDOWED, PROCESS, **{name: "cubic"})
    with pytest.raises(ValueError, match="needs the tokenizer's codebook"):
        Generator(WINDOWED, PROCESS, noise="codebook")
