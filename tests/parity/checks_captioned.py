"""LlamaGen from text: captions, prefix with hidden padding, cached and guided logits, codes."""

import dataclasses
import functools

import flax.linen as nn
import golden as golden_lib
import jax
import jax.numpy as jnp
from checks_gpt import backbone_of, compare_all, square
from checks_mar import converter

from arcond_jax.convert import llamagen as llamagen_table
from arcond_jax.models import captioned
from arcond_jax.sampling import codes as codes_lib
from arcond_jax.sampling import filters
from arcond_jax.transport import refiners

SHOWN = 8  # places of the prefix that are recorded, the last ones


def check(golden: golden_lib.Golden) -> None:
    config, inputs = golden.config, golden.inputs
    assert config["class_dropout_prob"] > 0
    num_captions = config["batch"]
    backbone = backbone_of(config, config["n_layer"], square(config["block_size"]))
    network = captioned.Captioned(
        backbone.clone(num_prefix=config["cls_token_num"]),
        num_captions,
        config["vocab_size"],
        config["caption_dim"],
    )
    init = functools.partial(network.init, method=captioned.Captioned.touch_all)
    abstract = nn.unbox(jax.eval_shape(init, jax.random.key(0)))["params"]
    convert = converter(llamagen_table.captioned_rows(network), abstract)
    caption, valid = jnp.asarray(inputs["caption"]), jnp.asarray(inputs["mask"] == 1)
    codes, label = jnp.asarray(inputs["idx"], jnp.int32), jnp.arange(num_captions)
    both_labels = jnp.concatenate([label, network.null(label)])
    both_codes = jnp.concatenate([codes, codes])

    def apply(params, *args, method):
        return network.apply({"params": params}, *args, method=method)

    def logits_of(params, cond):
        return apply(params, cond, jnp.zeros((*cond.shape[:-1], 0), int), method="factor_logits")

    def cached_logits(params):
        cond, cache = apply(params, both_labels, method="start")

        def body(cache, position):
            given = both_codes[:, position, None]
            cond, cache = apply(params, given, position, both_labels, cache, method="advance")
            return cache, cond

        rest = jax.lax.scan(body, cache, jnp.arange(network.length - 1))[1]
        return logits_of(params, jnp.moveaxis(jnp.concatenate([cond[None], rest]), 0, 1))

    def prefix_logits(params, x, visible):
        cache = network.backbone.empty_cache(len(x))
        cache = dataclasses.replace(cache, visible=visible)
        return logits_of(params, apply(params, x, cache, method="run")[0])

    def greedy(params, scale):
        loop = codes_lib.CodeSampler(network, (codes_lib.Draw(guidance_scale=scale, top_k=1),))
        drawn = loop(params, jax.random.key(0), label, refiner=refiners.Identity())
        return drawn.tokens.codes

    @jax.jit
    def run(params):
        params = captioned.with_captions(params, caption, valid)
        x, visible = apply(params, both_labels, method="prefix")
        raw, scale = cached_logits(params), config["cfg_scale"]
        return {
            "cap_embed": x[jnp.array([0, num_captions]), -SHOWN:],
            "prefill_logits": prefix_logits(params, x, visible)[:, -SHOWN:],
            "gen_logits_raw": raw,
            "gen_logits_cfg": filters.guide(raw, jnp.asarray(scale)),
            "greedy_cfg": greedy(params, scale),
            "greedy_nocfg": greedy(params, 1.0),
        }

    compare_all(golden, lambda state: run(convert(state)))


CHECKS = {"llamagen_t2i": check}
