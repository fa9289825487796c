"""LlamaGen from text: captions, prefix with hidden padding, cached and guided logits, codes."""

import golden as golden_lib
import jax
import jax.numpy as jnp
from checks_gpt import Model, backbone_of, compare_all, square
from checks_mar import converter

from arcond_jax import types
from arcond_jax.convert import llamagen as llamagen_table
from arcond_jax.models import llamagen
from arcond_jax.sampling import guidance as guidance_lib

SHOWN = 8  # places of the prefix that are recorded, the last ones


def check(golden: golden_lib.Golden) -> None:
    config, inputs = golden.config, golden.inputs
    assert config["class_dropout_prob"] > 0
    backbone = backbone_of(config, config["n_layer"], square(config["block_size"]))
    network = llamagen.LlamaGen(
        backbone=backbone.clone(num_prefix=config["cls_token_num"]),
        num_classes=None,
        caption_width=config["caption_dim"],
        num_codes=config["vocab_size"],
    )
    model = Model(network)
    convert = converter(llamagen_table.rows(network), model.abstract())
    caption = types.Caption(
        embedding=jnp.asarray(inputs["caption"]),
        valid=jnp.asarray(inputs["mask"] == 1),
        given=jnp.ones(config["batch"], bool),
    )
    factors = jnp.asarray(inputs["idx"], jnp.int32)[..., None]
    guidance = guidance_lib.Guidance(scale=config["cfg_scale"])

    @jax.jit
    def run(params):
        prompts = guidance.prompts(network, caption)
        x, about = model.apply(params, prompts, jnp.zeros(1, jnp.int32), method="prefix")
        cache = network.empty_cache(prompts)
        cond, _ = model.apply(params, x, about, prompts, cache, method="advance")
        raw = model.cached_logits(params, guidance.both(factors), prompts)[0]
        return {
            # A caption, and the same one not given beside it.
            "cap_embed": x[:2, -SHOWN:],
            "prefill_logits": golden_lib.in_halves(model.logits(params, cond[:, -SHOWN:])),
            "gen_logits_raw": golden_lib.in_halves(raw),
            "gen_logits_cfg": guidance.combine(raw, guidance.weight(0, 1, network.length)),
            "greedy_cfg": model.greedy(params, caption, guidance)[..., 0],
            "greedy_nocfg": model.greedy(params, caption, guidance_lib.Guidance())[..., 0],
        }

    compare_all(golden, lambda state: run(convert(state)))


CHECKS = {"llamagen_t2i": check}
