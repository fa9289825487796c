"""LlamaGen: positions, forward, cached and guided logits, filters, greedy sampling."""

import dataclasses

import flax.linen as nn
import golden as golden_lib
import jax
import jax.numpy as jnp
import numpy as np
from checks_mar import converter

from arcond_jax import types
from arcond_jax.convert import llamagen as llamagen_table
from arcond_jax.models import causal, gpt, llamagen
from arcond_jax.nn import factors as factors_lib
from arcond_jax.nn import mlp, rope
from arcond_jax.sampling import filters, heads, raster
from arcond_jax.sampling import guidance as guidance_lib
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


class Model:
    """A causal model of codes as the archives ask for it, in factors throughout."""

    def __init__(self, network: types.CausalModel) -> None:
        self.network = network

    def abstract(self):
        """Shapes of the parameters."""
        init = causal.Generator(self.network, losses=()).init
        return nn.unbox(jax.eval_shape(init, jax.random.key(0)))

    def apply(self, params, *args, method):
        return self.network.apply({"params": params}, *args, method=method)

    def logits(self, params, cond):
        """Of the first factor."""
        none = jnp.zeros((*cond.shape[:-1], 0), jnp.int32)
        return self.apply(params, cond, none, method="factor_logits")

    def forced_logits(self, params, factors, prompt, at=None):
        """Of every factor of every position from real prefixes, as training asks for them."""
        at = jnp.arange(self.network.length) if at is None else at
        token = causal.given(factors, None, 1)
        cond = self.apply(params, token, prompt, at, method=causal.teacher_forced)
        return self.apply(params, cond, factors, method="all_factor_logits")

    def fed(self, params, factors, prompt, at):
        """The prompt and the given codes as the blocks are fed them, and what each is about.

        `at` holds one position more than there are codes.
        """
        x, about = self.apply(params, prompt, at[..., :1], method="prefix")
        token = types.Token(codes=factors[:, :, None])
        embedded = self.apply(params, token, at, method="embed")
        return jnp.concatenate([x, embedded], axis=1), jnp.concatenate([about, at[..., 1:]], -1)

    def cached_logits(self, params, factors, prompt):
        """Of every factor, one position at a time as sampling goes, all rows of a guided batch."""
        x, cache = raster.Raster(self.network, ()).start(params, prompt)

        def body(carry, position):
            x, cache = carry
            cond, cache = self.apply(params, x, position[None], prompt, cache, method="advance")
            token = types.Token(codes=factors[:, position, None, None])
            x = self.apply(params, token, position + jnp.arange(2), method="embed")
            logits = [
                self.apply(params, cond[:, 0], factors[:, position, :i], method="factor_logits")
                for i in range(len(self.network.factor_sizes))
            ]
            return (x, cache), logits

        logits = jax.lax.scan(body, (x, cache), jnp.arange(self.network.length))[1]
        return [jnp.moveaxis(x, 0, 1) for x in logits]

    def greedy(self, params, prompt, guidance):
        """The most likely factors, drawn by the sampling loop."""
        loop = raster.Raster(self.network, (heads.Codes(top_k=1),), guidance)
        drawn = loop(params, jax.random.key(0), prompt, refiner=refiners.Identity())
        return factors_lib.split(drawn.tokens.codes, self.network.factor_sizes)


def check(golden: golden_lib.Golden) -> None:
    config, inputs = golden.config, golden.inputs
    assert config["cls_token_num"] == 1 and config["class_dropout_prob"] > 0
    backbone = backbone_of(config, config["n_layer"], square(config["block_size"]))
    network = llamagen.LlamaGen(
        backbone=backbone, num_classes=config["num_classes"], num_codes=config["vocab_size"]
    )
    model, length = Model(network), network.length
    codes, label, dropped = (
        jnp.asarray(inputs[name], jnp.int32) for name in ("idx", "labels", "labels_dropped")
    )
    convert = converter(llamagen_table.rows(network), model.abstract())
    guidance = guidance_lib.Guidance(scale=config["cfg_scale"])

    def embedded(params):
        """And what each is about; the last code tells of a position that does not exist."""
        return model.fed(params, codes[..., None], label, jnp.arange(length + 1))

    def train_logits(params):
        """Under the labels and under those with some dropped, in one batch."""
        labels, twice = jnp.concatenate([label, dropped]), jnp.concatenate([codes, codes])
        return jnp.split(model.forced_logits(params, twice[..., None], labels)[0], 2)

    def full_logits(params):
        x, about = embedded(params)
        cond, _ = model.apply(params, x, about, label, None, method="advance")
        return model.logits(params, cond)

    @jax.jit
    def run(params):
        train, train_dropped = train_logits(params)
        losses = cross_entropy(train, codes)
        prompts = guidance.prompts(network, label)
        raw = model.cached_logits(params, guidance.both(codes[..., None]), prompts)[0]
        outputs = {
            "freqs_cis": rope.rope_table(
                backbone.grid, backbone.width // backbone.num_heads, num_prefix=1
            ),
            "h_embed": embedded(params)[0],
            "train_logits": train,
            "train_logits_null": train_dropped,
            "train_loss": jnp.mean(losses),
            # The official `valid` keeps every other sample, from the first.
            "train_loss_valid": jnp.mean(losses[::2]),
            "eval_logits_full": full_logits(params),
            "gen_logits_raw": golden_lib.in_halves(raw),
            "gen_logits_cfg": guidance.combine(raw, guidance.weight(0, 1, length)),
        }
        if "greedy_nocfg" in golden.outputs:
            interval = config["cfg_interval"]
            # The first token and decoding steps 0 to `interval`; -1 is all of them.
            some = dataclasses.replace(guidance, positions=None if interval < 0 else interval + 2)
            choices = {
                "greedy_nocfg": guidance_lib.Guidance(),
                "greedy_cfg": guidance,
                "greedy_cfg_interval": some,
            }
            for name, chosen in choices.items():
                outputs[name] = model.greedy(params, label, chosen)[..., 0]
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
