"""RAR: forward in any order, cached and guided logits, greedy sampling, one block."""

import golden as golden_lib
import jax
import jax.numpy as jnp
from checks_gpt import Model, compare_all, cross_entropy, square
from checks_mar import converter

from arcond_jax.convert import rar as rar_table
from arcond_jax.models import rar
from arcond_jax.sampling import guidance as guidance_lib


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
    model, length = Model(network), network.length
    convert = converter(rar_table.rows(network), model.abstract())
    codes, label, order = (jnp.asarray(inputs[n], jnp.int32) for n in ("ids", "labels", "orders"))
    raster = jnp.broadcast_to(jnp.arange(length), order.shape)
    null = network.null(label)
    visited = jnp.take_along_axis(codes, order, axis=1)

    def guidance(power):
        return guidance_lib.Guidance(
            scale=config["guidance_scale"], schedule="power_cosine", power=power
        )

    def shares(power):
        return jnp.stack([guidance(power).weight(i, i + 1, length) for i in range(length)])

    def all_logits(params, codes, at, label):
        """Of all positions in the order they are visited, and of one more that does not exist."""
        # The last code is told no next position: a spare row of the table, made zero.
        at = jnp.pad(at, ((0, 0), (0, 1)), constant_values=length)
        told = params["next_position"].at[rar.PREFIX + length].set(0.0)
        params = params | {"next_position": told}
        x, about = model.fed(params, codes[..., None], label, at)
        cond, _ = model.apply(params, x, about, label, None, method="advance")
        return model.logits(params, cond[:, rar.PREFIX - 1 :])

    def first_block(params):
        """The first layer and the last modulation alone, on embeddings without positions."""
        table = params["embed"]["table"]
        x = table[codes[:, :5]]
        given = table[network.num_codes + 1 + label][:, None] + params["modulator_position"][:5]
        block = rar.Block(network.num_heads, network.mlp_hidden, 0.0, 0.0, network.dtype)
        layer = jax.tree.map(lambda p: p[0], params["blocks"])
        (y, _), _ = block.apply({"params": layer}, (x, None), jnp.array(0), jax.nn.silu(given))
        one = network.clone(depth=1)
        # A block whose gates are 0 hands on what it is given.
        silent = jax.tree.map(lambda p: jnp.zeros_like(p[:1]), params["blocks"])
        variables = {"params": params | {"blocks": silent}}
        final, _ = one.apply(variables, x, jnp.arange(5), label, None, method="advance")
        return y, final

    @jax.jit
    def run(params):
        # All rows in one call, which is compiled once.
        rows = all_logits(
            params,
            jnp.concatenate([visited, visited, codes, codes]),
            jnp.concatenate([order, order, raster, raster]),
            jnp.concatenate([label, null, label, null]),
        )
        logits, of_none, of_raster, of_raster_none = jnp.split(rows, 4)
        chosen = guidance(config["guidance_scale_pow"])
        prompts = chosen.prompts(network, label)
        raw = model.cached_logits(params, chosen.both(codes[..., None]), prompts)[0]
        weights = shares(chosen.power)
        block, final = first_block(params)
        return {
            "condition": network.num_codes + 1 + label,
            "none_condition": network.num_codes + 1 + null,
            "logits": logits,
            "labels_shuffled": visited,
            "unshuffled": jnp.take_along_axis(visited, jnp.argsort(order, axis=-1), axis=1),
            "logits_raster": of_raster,
            "logits_none": of_none,
            "loss": jnp.mean(cross_entropy(logits[:, :-1], visited)),
            "gen_logits_raw": golden_lib.in_halves(raw),
            "gen_logits_raw_nocache": jnp.concatenate([of_raster, of_raster_none])[:, :-1],
            "cfg_scale_per_step": weights,
            "cfg_scale_per_step_pow0": shares(0.0),
            "gen_logits_cfg": jax.vmap(chosen.combine, (1, 0), 1)(raw, weights),
            "greedy": model.greedy(params, label, chosen)[..., 0],
            "greedy_nocfg": model.greedy(params, label, guidance_lib.Guidance())[..., 0],
            "block0": block,
            "final_layer": final,
        }

    compare_all(golden, lambda state: run(convert(state)))


CHECKS = {"rar": check}
