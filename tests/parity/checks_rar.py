"""RAR: forward in any order, cached and guided logits, greedy sampling, one block."""

import flax.linen as nn
import golden as golden_lib
import jax
import jax.numpy as jnp
from checks_gpt import compare_all, cross_entropy, square
from checks_mar import converter

from arcond_jax.convert import rar as rar_table
from arcond_jax.models import rar
from arcond_jax.sampling import codes as codes_lib
from arcond_jax.sampling import filters
from arcond_jax.transport import refiners


def check(golden: golden_lib.Golden) -> None:
    config, inputs = golden.config, golden.inputs
    network = rar.RAR(
        grid=square(config["image_seq_len"]),
        num_codes=config["codebook_size"],
        num_classes=config["condition_num_classes"],
        depth=config["num_hidden_layers"],
        width=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        mlp_hidden=config["intermediate_size"],
    )
    generator = rar.Generator(network)
    abstract = nn.unbox(jax.eval_shape(generator.init, jax.random.key(0)))
    convert = converter(rar_table.rows(network), abstract)
    codes, label, order = (jnp.asarray(inputs[n], jnp.int32) for n in ("ids", "labels", "orders"))
    length, raster = network.length, rar.raster_orders(*codes.shape)
    null = jnp.full_like(label, network.num_classes)
    both_labels = jnp.concatenate([label, null])
    both_codes = jnp.concatenate([codes, codes])
    visited = jnp.take_along_axis(codes, order, axis=1)
    scale, power = config["guidance_scale"], config["guidance_scale_pow"]

    def shares(power):
        return jnp.stack(
            [filters.power_cosine_weight(scale, power, i / length) for i in range(length)]
        )

    def cached_logits(params):
        def apply(*args, method):
            return network.apply({"params": params}, *args, method=method)

        none = jnp.zeros((len(both_labels), 0), jnp.int32)
        cond, cache = apply(both_labels, method="start")

        def body(cache, position):
            given = both_codes[:, position, None]
            cond, cache = apply(given, position, both_labels, cache, method="advance")
            return cache, cond

        rest = jax.lax.scan(body, cache, jnp.arange(length - 1))[1]
        conds = jnp.concatenate([cond[None], rest])
        logits = jax.vmap(lambda c: apply(c, none, method="factor_logits"))(conds)
        return jnp.moveaxis(logits, 0, 1)

    def greedy(params, scale):
        draws = (codes_lib.Draw(guidance_scale=scale, top_k=1),)
        loop = codes_lib.CodeSampler(network, draws, guidance_power=power)
        drawn = loop(params, jax.random.key(0), label, refiner=refiners.Identity())
        return drawn.tokens.codes

    def first_block(params):
        """The first layer and the last modulation alone, on embeddings without positions."""
        table = params["embed"]["table"]
        x = table[codes[:, :5]]
        given = table[network.num_codes + 1 + label][:, None] + params["modulator_position"][:5]
        block = rar.Block(network.num_heads, network.mlp_hidden, 0.0, 0.0, network.dtype)
        layer = jax.tree.map(lambda p: p[0], params["blocks"])
        (y, _), _ = block.apply({"params": layer}, (x, None), jnp.array(0), jax.nn.silu(given))
        one = network.clone(depth=1)
        silent = jax.tree.map(lambda p: jnp.zeros_like(p[:1]), params["blocks"])

        def last(module):
            # A block whose gates are 0 hands on what it is given.
            return module._run(x, label, None)[0]

        final = one.apply({"params": params | {"blocks": silent}}, method=last)
        return y, final

    @jax.jit
    def run(params):
        # All rows in one call, which is compiled once.
        rows = generator.logits(
            params,
            jnp.concatenate([visited, visited, both_codes]),
            jnp.concatenate([order, order, raster, raster]),
            jnp.concatenate([both_labels, both_labels]),
        )
        logits, of_none, of_raster, of_raster_none = jnp.split(rows, 4)
        nocache = jnp.concatenate([of_raster, of_raster_none])[:, :-1]
        raw = cached_logits(params)
        weights = shares(power)
        block, final = first_block(params)
        guided = jax.vmap(filters.guide, (1, 0), 1)(raw, weights)
        return {
            "condition": network.num_codes + 1 + label,
            "none_condition": network.num_codes + 1 + null,
            "logits": logits,
            "labels_shuffled": visited,
            "unshuffled": jnp.take_along_axis(visited, jnp.argsort(order, axis=-1), axis=1),
            "logits_raster": of_raster,
            "logits_none": of_none,
            "loss": jnp.mean(cross_entropy(logits[:, :-1], visited)),
            "gen_logits_raw": raw,
            "gen_logits_raw_nocache": nocache,
            "cfg_scale_per_step": weights,
            "cfg_scale_per_step_pow0": shares(0.0),
            "gen_logits_cfg": guided,
            "greedy": greedy(params, scale),
            "greedy_nocfg": greedy(params, 1.0),
            "block0": block,
            "final_layer": final,
        }

    compare_all(golden, lambda state: run(convert(state)))


CHECKS = {"rar": check}
