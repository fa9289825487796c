"""Open-MAGVIT2's generator: positions, forward, cached and guided logits, greedy sampling."""

import flax.linen as nn
import golden as golden_lib
import jax
import jax.numpy as jnp
from checks_gpt import backbone_of, compare_all, cross_entropy, square
from checks_mar import converter

from arcond_jax.convert import magvit2 as magvit2_table
from arcond_jax.models import magvit2
from arcond_jax.nn import rope
from arcond_jax.sampling import codes as codes_lib
from arcond_jax.sampling import filters
from arcond_jax.transport import refiners


def check(golden: golden_lib.Golden) -> None:
    config, inputs = golden.config, golden.inputs
    backbone = backbone_of(config, config["spatial_n_layer"], square(config["block_size"]))
    network = magvit2.MAGVIT2(
        backbone,
        num_classes=config["class_num"],
        factor_sizes=tuple(2**bits for bits in config["factorized_bits"]),
        intra_depth=config["factorized_n_layer"],
    )
    generator = magvit2.Generator(network)
    abstract = nn.unbox(jax.eval_shape(generator.init, jax.random.key(0)))
    convert = converter(magvit2_table.rows(network), abstract)
    factors = jnp.stack([jnp.asarray(inputs[n], jnp.int32) for n in ("pre", "post")], axis=-1)
    label = jnp.asarray(inputs["labels"], jnp.int32)[:, 0]
    null = jnp.full_like(label, network.num_classes)
    both_labels = jnp.concatenate([label, null])
    both_factors = jnp.concatenate([factors, factors])
    scales = config["cfg_scale"]

    def cached_logits(params):
        """Of both factors, step by step, both halves of a guided batch."""

        def apply(*args, method):
            return network.apply({"params": params}, *args, method=method)

        def both_logits(cond, position):
            given = both_factors[:, position]
            return tuple(apply(cond, given[:, :i], method="factor_logits") for i in range(2))

        cond, cache = apply(both_labels, method="start")
        first = both_logits(cond, 0)

        def body(cache, position):
            given = both_factors[:, position - 1]
            cond, cache = apply(given, position, both_labels, cache, method="advance")
            return cache, both_logits(cond, position)

        rest = jax.lax.scan(body, cache, jnp.arange(1, network.length))[1]
        return [
            jnp.concatenate([head[:, None], jnp.moveaxis(tail, 0, 1)], axis=1)
            for head, tail in zip(first, rest, strict=True)
        ]

    def greedy(params):
        draws = tuple(codes_lib.Draw(guidance_scale=scale, top_k=1) for scale in scales)
        loop = codes_lib.CodeSampler(network, draws)
        drawn = loop(params, jax.random.key(0), label, refiner=refiners.Identity())
        return network.split(drawn.tokens.codes)

    @jax.jit
    def run(params):
        both = generator.logits(params, both_factors, both_labels)
        (pre, pre_null), (post, post_null) = (jnp.split(logits, 2) for logits in both)
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
        raw_pre, raw_post = cached_logits(params)
        codes = greedy(params)
        return outputs | {
            "gen_logits_pre_raw": raw_pre,
            "gen_logits_post_raw": raw_post,
            "gen_logits_pre_cfg": filters.guide(raw_pre, jnp.asarray(scales[0])),
            "gen_logits_post_cfg": filters.guide(raw_post, jnp.asarray(scales[1])),
            "greedy_pre": codes[..., 0],
            "greedy_post": codes[..., 1],
        }

    compare_all(golden, lambda state: run(convert(state)))


CHECKS = {"magvit2_gpt": check}
