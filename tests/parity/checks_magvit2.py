"""Open-MAGVIT2's generator: positions, forward, cached and guided logits, greedy sampling."""

import golden as golden_lib
import jax
import jax.numpy as jnp
from checks_gpt import Model, backbone_of, compare_all, cross_entropy, square
from checks_mar import converter

from arcond_jax.convert import magvit2 as magvit2_table
from arcond_jax.models import magvit2
from arcond_jax.nn import rope
from arcond_jax.sampling import guidance as guidance_lib


def check(golden: golden_lib.Golden) -> None:
    config, inputs = golden.config, golden.inputs
    backbone = backbone_of(config, config["spatial_n_layer"], square(config["block_size"]))
    network = magvit2.MAGVIT2(
        backbone=backbone,
        num_classes=config["class_num"],
        factor_sizes=tuple(2**bits for bits in config["factorized_bits"]),
        intra_depth=config["factorized_n_layer"],
    )
    model = Model(network)
    convert = converter(magvit2_table.rows(network), model.abstract())
    factors = jnp.stack([jnp.asarray(inputs[n], jnp.int32) for n in ("pre", "post")], axis=-1)
    label = jnp.asarray(inputs["labels"], jnp.int32)[:, 0]
    scale, later_scale = config["cfg_scale"]
    guidance = guidance_lib.Guidance(scale=scale, later_scale=later_scale)
    both_factors, both_labels = guidance.both(factors), guidance.prompts(network, label)

    @jax.jit
    def run(params):
        both = model.forced_logits(params, both_factors, both_labels)
        (pre, pre_null), (post, post_null) = ((x[::2], x[1::2]) for x in both)
        outputs = {
            "freqs_cis": rope.rope_table(
                backbone.grid, backbone.width // backbone.num_heads, num_prefix=1
            ),
            "logits_pre": pre,
            "logits_post": post,
            "logits_pre_null": pre_null,
            "logits_post_null": post_null,
            "loss_pre": jnp.mean(cross_entropy(pre, factors[..., 0])),
            "loss_post": jnp.mean(cross_entropy(post, factors[..., 1])),
        }
        if "greedy_pre" not in golden.outputs:
            return outputs
        greedy = model.greedy(params, label, guidance)
        for i, raw in enumerate(model.cached_logits(params, both_factors, both_labels)):
            weight, name = guidance.weight(0, 1, network.length, factor=i), ("pre", "post")[i]
            outputs |= {
                f"gen_logits_{name}_raw": golden_lib.in_halves(raw),
                f"gen_logits_{name}_cfg": guidance.combine(raw, weight),
                f"greedy_{name}": greedy[..., i],
            }
        return outputs

    compare_all(golden, lambda state: run(convert(state)))


CHECKS = {"magvit2_gpt": check}
