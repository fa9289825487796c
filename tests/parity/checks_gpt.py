"""LlamaGen: positions, forward, cached and guided logits, filters, greedy sampling."""

import functools

import flax.linen as nn
import golden as golden_lib
import jax
import jax.numpy as jnp
import numpy as np
from checks_mar import converter

from arcond_jax.convert import llamagen as llamagen_table
from arcond_jax.models import gpt
from arcond_jax.models.joint import Joint
from arcond_jax.nn import mlp, rope
from arcond_jax.sampling import causal, filters
from arcond_jax.transport import refiners


def cross_entropy(logits, targets):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    return -picked[..., 0]


def compare_all(golden, check, but=frozenset(), **options):
    """Compares, and fails if an output is left out."""

    def checked(state):
        outputs = check(state)
        missing = set(golden.outputs) ^ set(outputs) ^ but
        assert not missing, f"{golden.path.name}: not compared: {sorted(missing)}"
        return outputs

    golden_lib.compare(golden, checked, **options)


def backbone_of(config: dict, depth: int, grid: tuple[int, int]) -> gpt.GPT:
    """The causal blocks of an archive of LlamaGen or Open-MAGVIT2."""
    assert config["norm_eps"] == 1e-5 and config["rope_base"] == 10000
    width = config["dim"]
    hidden = int(8 * width / 3)
    hidden = int((config.get("ffn_dim_multiplier") or 1) * hidden)
    hidden = config["multiple_of"] * -(-hidden // config["multiple_of"])
    if config["multiple_of"] == 256 and not config.get("ffn_dim_multiplier"):
        assert hidden == mlp.swiglu_hidden(width)
    return gpt.GPT(
        depth=depth,
        width=width,
        num_heads=config["n_head"],
        grid=grid,
        num_kv_heads=config["n_kv_head"],
        mlp_hidden=hidden,
    )


def square(block_size: int) -> tuple[int, int]:
    side = round(block_size**0.5)
    assert side * side == block_size
    return side, side


def check(golden: golden_lib.Golden) -> None:
    config, inputs = golden.config, golden.inputs
    assert config["cls_token_num"] == 1 and config["class_dropout_prob"] > 0
    backbone = backbone_of(config, config["n_layer"], square(config["block_size"]))
    network = Joint(backbone, config["num_classes"], num_codes=config["vocab_size"])
    codes, label, dropped = (
        jnp.asarray(inputs[name], jnp.int32) for name in ("idx", "labels", "labels_dropped")
    )
    batch = len(label)
    null = jnp.full_like(label, network.num_classes)
    init = functools.partial(network.init, method=Joint.touch_all)
    abstract = nn.unbox(jax.eval_shape(init, jax.random.key(0), label))["params"]
    convert = converter(llamagen_table.rows(network), abstract)

    def apply(params, *args, method):
        return network.apply({"params": params}, *args, method=method)

    def embedded(params, codes, label):
        token = apply(params, label, method=Joint.class_token)
        told = apply(params, None, codes[..., None], method=Joint.embed)
        return jnp.concatenate([token, told], axis=1)

    def logits_of(params, cond):
        rows = apply(params, cond, method=Joint.slots)
        return apply(params, rows, method=Joint.logits)[..., 0, :]

    def train_logits(params):
        """Under the labels and under those with some dropped, in one batch."""
        labels, twice = jnp.concatenate([label, dropped]), jnp.concatenate([codes, codes])
        cond = apply(params, None, twice[..., None], labels, method=Joint.teacher_forced)
        return jnp.split(logits_of(params, cond), 2)

    def full_logits(params):
        x = embedded(params, codes, label)
        cond, _ = apply(params, x, None, jnp.arange(x.shape[1]), method=Joint.condition)
        return logits_of(params, cond)

    def cached_logits(params):
        """Step by step, one token at a time, both halves of a guided batch."""
        x = embedded(params, jnp.concatenate([codes, codes]), jnp.concatenate([label, null]))

        def step(cache, column):
            cond, cache = apply(
                params, column[:, None], cache, jnp.zeros(1, jnp.int32), method=Joint.condition
            )
            return cache, logits_of(params, cond[:, 0])

        cache = backbone.empty_cache(2 * batch)
        logits = jax.lax.scan(step, cache, jnp.moveaxis(x[:, :-1], 1, 0))[1]
        return jnp.moveaxis(logits, 0, 1)

    def greedy(params, **choices):
        loop = causal.CausalSampler(network, None, top_k=1, **choices)
        drawn = loop(params, jax.random.key(0), label, refiner=refiners.Identity())
        return drawn.tokens.codes

    @jax.jit
    def run(params):
        train, train_dropped = train_logits(params)
        losses = cross_entropy(train, codes)
        raw = cached_logits(params)
        scale, interval = config["cfg_scale"], config["cfg_interval"]
        # The first token and decoding steps 0 to `interval`; -1 is all of them.
        until = None if interval < 0 else interval + 2
        outputs = {
            "freqs_cis": rope.rope_table(
                backbone.grid, backbone.width // backbone.num_heads, num_prefix=1
            ),
            "h_embed": embedded(params, codes, label),
            "train_logits": train,
            "train_logits_null": train_dropped,
            "train_loss": jnp.mean(losses),
            # The official `valid` keeps every other sample, from the first.
            "train_loss_valid": jnp.mean(losses[::2]),
            "eval_logits_full": full_logits(params),
            "gen_logits_raw": raw,
            "gen_logits_cfg": filters.guide(raw, jnp.asarray(scale)),
        }
        if "greedy_nocfg" in golden.outputs:
            guided = dict(guidance_scale=scale)
            outputs |= {
                "greedy_nocfg": greedy(params),
                "greedy_cfg": greedy(params, **guided),
                "greedy_cfg_interval": greedy(params, guided_positions=until, **guided),
            }
        return outputs

    # What is cut is -inf and the rest untouched, so these are equal to the last bit.
    cuts = {"topk": {"top_k": config["top_k"] or None}, "topp": {"top_p": config["top_p"]}}
    filtered = set()
    for name, choices in (cuts | {"both": cuts["topk"] | cuts["topp"]}).items():
        cut = filters.filter_logits(jnp.asarray(inputs["filter_logits"]), **choices)
        filtered.add(f"filter_{name}_inf")
        np.testing.assert_array_equal(cut, golden.outputs[f"filter_{name}_inf"], err_msg=name)
    compare_all(golden, lambda state: run(convert(state)), but=filtered)


CHECKS = {"llamagen_gpt": check}
