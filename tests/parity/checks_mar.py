"""MAR: denoising MLP, masked forward and loss, sampling."""

import dataclasses

import checks_diffusion
import flax.linen as nn
import golden as golden_lib
import jax
import jax.numpy as jnp
import numpy as np

from arcond_jax.convert import mar as mar_table
from arcond_jax.convert import table
from arcond_jax.diffusion import gaussian, solvers
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.models import diffusion_head, mar
from arcond_jax.sampling import guidance as guidance_lib
from arcond_jax.sampling import mar as mar_sampling
from arcond_jax.tokenizers import kl
from arcond_jax.transport import refiners

COSINE = schedule_lib.Schedule.cosine()


def converter(rows, abstract):
    """Official parameters to ours, after a round trip that must lose nothing."""

    def convert(state):
        ours = table.to_ours(rows, state, abstract)
        back = table.to_theirs(rows, ours)
        assert back.keys() == state.keys()
        for name, array in state.items():
            np.testing.assert_array_equal(back[name], array, err_msg=name)
        return ours

    return convert


def check_head(golden: golden_lib.Golden) -> None:
    config, inputs = golden.config, jax.tree.map(jnp.asarray, golden.inputs)
    channels = config["in_channels"]
    head = diffusion_head.DiffusionHead(channels, config["depth"], config["width"])
    x, t, cond = (jnp.asarray(inputs[name]) for name in ("x", "t", "c"))
    abstract = nn.unbox(jax.eval_shape(head.init, jax.random.key(0), x, t, cond))["params"]
    convert = converter(table.prefixed(mar_table.head_rows(head), "", "net"), abstract)
    process = checks_diffusion.respaced(config["num_sampling_steps"])

    def steps(params):
        """Every reverse step on its own, by its index in the respaced process."""
        noisy = inputs["chain_x"]
        index = jnp.broadcast_to(jnp.arange(len(noisy))[:, None], noisy.shape[:2])
        time = jnp.asarray(process.timesteps)[index]
        conds = jnp.broadcast_to(cond, (len(noisy), *cond.shape))
        output = head.apply({"params": params}, noisy, time, conds)
        predicted, v = jnp.split(output, 2, axis=-1)
        x0 = gaussian.predict_x0(noisy, index, predicted, schedule=process)
        mean = gaussian.posterior_mean(x0, noisy, index, schedule=process)
        log_variance = gaussian.log_variance(v, index, schedule=process)
        temperature = jnp.where(index > 0, inputs["temperature"], 0.0)[..., None]
        noise = temperature * jnp.exp(0.5 * log_variance) * inputs["chain_noise"]
        return x0, mean, log_variance, mean + noise

    @jax.jit
    def run(params):
        net, parts = head.apply({"params": params}, x, t, cond, capture_intermediates=True)
        half = x[: len(x) // 2]
        both = head.apply({"params": params}, jnp.concatenate([half, half]), t, cond)
        guidance = guidance_lib.Guidance(scale=float(golden.inputs["cfg_scale"]))
        weight = guidance.weight(0, 1, 1)
        guided = guidance.combine_noise(golden_lib.in_pairs(both), weight)[:, :channels]
        guided = jnp.concatenate([guided, guided])
        x0, mean, log_variance, drawn = steps(params)
        return {
            "t_freq": diffusion_head.time_features(t),
            "t_emb": parts["intermediates"]["time_1"]["__call__"][0],
            "net": net,
            "net_cfg": jnp.concatenate([guided, both[:, channels:]], axis=-1),
            "q_sample": gaussian.q_sample(inputs["q_x0"], t, inputs["q_noise"], schedule=COSINE),
            "chain_pred_xstart": x0,
            "chain_mean": mean,
            "chain_log_variance": log_variance,
            "chain_sample": drawn,
        }

    by_row = ("chain_pred_xstart", "chain_mean", "chain_log_variance", "chain_sample")
    # PyTorch's float32 exp misses the last bit of two frequencies, which moves an angle below 1024
    # by at most one spacing of float32 there; no parameter is involved, so there is no noise.
    spacing = {"t_freq": float(np.spacing(np.float32(999.0)))}
    golden_lib.compare(
        golden, lambda state: run(convert(state)), by_row=by_row, rounding=spacing, caps=spacing
    )


def network_of(config: dict) -> tuple[mar.MAR, mar.Generator]:
    """The network of an archive, and its loss without dropout."""
    side = config["img_size"] // config["vae_stride"] // config["patch_size"]
    head = diffusion_head.DiffusionHead(
        config["vae_embed_dim"] * config["patch_size"] ** 2,
        config["diffloss_d"],
        config["diffloss_w"],
    )
    assert config["norm_eps"] == 1e-6
    network = mar.MAR(
        grid=(side, side),
        num_classes=config["class_num"],
        head=head,
        buffer_size=config["buffer_size"],
        mlp_ratio=config["mlp_ratio"],
        encoder_depth=config["encoder_depth"],
        encoder_width=config["encoder_embed_dim"],
        encoder_num_heads=config["encoder_num_heads"],
        decoder_depth=config["decoder_depth"],
        decoder_width=config["decoder_embed_dim"],
        decoder_num_heads=config["decoder_num_heads"],
        attention_dropout=0.0,
        dropout=0.0,
    )
    # Fewer tokens may be masked in an archive than ever are in training.
    mask_rate_min = min(config.get("mask_rate", 0.7), 0.7)
    return network, mar.Generator(network, COSINE, mask_rate_min=mask_rate_min)


def mar_converter(generator: mar.Generator):
    abstract = nn.unbox(jax.eval_shape(generator.init, jax.random.key(0)))
    return converter(mar_table.rows(generator.network), abstract)


def check_forward(golden: golden_lib.Golden) -> None:
    config, inputs = golden.config, jax.tree.map(jnp.asarray, golden.inputs)
    network, generator = network_of(config)
    convert = mar_converter(generator)
    length = network.length
    null = network.num_classes
    image = jnp.asarray(inputs["imgs"]).transpose(0, 2, 3, 1)
    label = jnp.asarray(inputs["labels"])
    dropped = jnp.where(inputs["drop_u"] < config["label_drop_prob"], null, label)
    order = jnp.asarray(inputs["orders"])[:, ::-1]
    num_visible = length - int(np.ceil(length * golden.inputs["mask_rate"]))
    # Official rows are raster ordered; ours are in generation order.
    back = jnp.argsort(order, axis=-1)
    visible = jnp.argsort(order[:, :num_visible], axis=-1)

    def in_raster(x):
        return jnp.take_along_axis(x, back[..., None], axis=1)

    def rows_in_order(x):
        """Rows [copies * b * l, ...] of the official loss to [b, copies, l, ...] of ours."""
        x = jnp.asarray(x).reshape(-1, len(label), length, *x.shape[1:]).swapaxes(0, 1)
        index = order[:, None].reshape(len(label), 1, length, *(1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, index, axis=2)

    @jax.jit
    def run(params):
        patches = kl.cut(image, config["patch_size"])
        latents = mar.in_order(patches, order)

        def encoder(label):
            n = generator.max_visible
            encoded = generator.apply(
                params, latents[:, :n], order[:, :n], label, num_visible, method=mar.MAR.encode
            )
            tokens = encoded[:, network.buffer_size :][:, :num_visible]
            tokens = jnp.take_along_axis(tokens, visible[..., None], axis=1)
            return jnp.concatenate([encoded[:, : network.buffer_size], tokens], axis=1)

        def losses(cond, copies):
            t, noise = (rows_in_order(inputs[f"{name}{copies}"]) for name in ("t", "noise"))
            return generator.head_losses(params, cond, latents, t, noise)

        cond = generator.teacher_forced(params, latents, order, label, num_visible)
        mse, vb = losses(cond, "")
        masked = jnp.arange(length) >= num_visible
        many = sum(losses(cond, "_mul4"))
        return {
            "patches": patches,
            "unpatchified": kl.paste(patches, network.grid, config["patch_size"]).transpose(
                0, 3, 1, 2
            ),
            "mask": in_raster(jnp.broadcast_to(masked[:, None], (*order.shape, 1)))[..., 0] * 1.0,
            "encoder": encoder(label),
            "encoder_uncond": encoder(jnp.full_like(label, null)),
            "encoder_train_labeldrop": encoder(dropped),
            "z": in_raster(cond),
            "mse": in_raster(mse[:, 0][..., None]).reshape(-1),
            "vb": in_raster(vb[:, 0][..., None]).reshape(-1),
            "loss_rows": in_raster((mse + vb)[:, 0][..., None]).reshape(-1),
            "loss": jnp.mean(mse + vb, where=masked),
            "loss_mul4": jnp.mean(many, where=masked),
        }

    golden_lib.compare(golden, lambda state: run(convert(state)))


def check_sample(golden: golden_lib.Golden) -> None:
    config, inputs = golden.config, golden.inputs
    network, generator = network_of(config)
    convert = mar_converter(generator)
    num_steps, guided = config["num_iter"], config["cfg"] != 1.0
    order = np.asarray(inputs["orders"])[:, ::-1]
    batch, length = order.shape
    label = jnp.full(batch, network.num_classes)
    if config["use_labels"]:
        label = jnp.asarray(inputs["labels"])
    solver = solvers.Solver(
        checks_diffusion.respaced(config["num_sampling_steps"]), temperature=config["temperature"]
    )
    guidance = guidance_lib.Guidance(scale=config["cfg"], schedule=config["cfg_schedule"])
    loop = mar_sampling.MARSampler(
        network, solver, num_ar_steps=num_steps, guidance=guidance, num_buckets=2
    )
    ends = mar_sampling.step_ends(length, num_steps).tolist()
    starts = [0, *ends[:-1]]

    # Official noise comes sample by sample, positions of a step in raster order.
    noise = np.zeros((solver.num_evaluations + 1, batch, length, network.channels), np.float32)
    places = []
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        due = np.argsort(order[:, start:end], axis=-1)  # generation numbers, in raster order
        places.append((start + due).reshape(-1))
        drawn = np.concatenate(
            [inputs[f"init_noise_{k}"][None], inputs[f"step_noise_{k}"][:, : due.size]]
        )
        rows = np.repeat(np.arange(batch), end - start)
        noise[:, rows, places[k]] = drawn

    @jax.jit
    def run(params):
        def noise_of(numbers):
            return jnp.asarray(noise)[:, :, numbers]

        drawn = loop.run(
            params,
            jnp.zeros((batch, length, network.channels)),
            jnp.asarray(order),
            label,
            noise_of,
            refiner=refiners.Identity(),
        ).tokens.latents
        in_order = mar.in_order(drawn, jnp.asarray(order))
        outputs = {"tokens": drawn}
        fed = jnp.append(label, network.null(label)) if guided else label
        copies = len(fed) // batch
        tokens = jnp.concatenate([in_order] * copies)
        orders = jnp.concatenate([jnp.asarray(order)] * copies)

        def conditions(start):
            """Of all positions, given the first `start` tokens."""

            def method(network):
                return network.decode(network.encode(tokens, orders, fed, start), orders, start)

            return generator.apply(params, method=method)

        every = jax.lax.map(conditions, jnp.asarray(starts))
        for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
            due = np.concatenate([places[k].reshape(batch, -1)] * copies)
            cond = jnp.take_along_axis(every[k], due[..., None], axis=1)
            outputs[f"z_{k}"] = cond.reshape(-1, cond.shape[-1])
            rows = np.repeat(np.arange(batch), end - start)
            outputs[f"sampled_{k}"] = in_order[rows, places[k]]
        side = network.grid
        outputs["latents"] = kl.paste(drawn, side, config["patch_size"]).transpose(0, 3, 1, 2)
        weights = [
            guidance.weight(start, min(end, length - 1), length)
            for start, end in zip(starts, ends, strict=True)
        ]
        outputs["cfg_iter"] = jnp.stack(weights) if guided else jnp.ones(num_steps)
        return outputs

    # The unconditional half of what the official head returns is thrown away there.
    kept = {name: x for name, x in golden.outputs.items() if name != "masks"}
    for k in range(num_steps):
        kept[f"sampled_{k}"] = kept[f"sampled_{k}"][: len(places[k])]
    visible = np.arange(length) < np.array([0, *ends])[:, None, None]
    for k in range(num_steps):  # the official mask after the last step still holds one position
        masked = np.take_along_axis(~visible[k], np.argsort(order, axis=-1), axis=-1)
        np.testing.assert_array_equal(golden.outputs["masks"][k], masked)
    trimmed = dataclasses.replace(golden, outputs=kept)
    golden_lib.compare(trimmed, lambda state: run(convert(state)), cap=None)


CHECKS = {
    "mar_diffloss_mlp": check_head,
    "mar_forward": check_forward,
    "mar_sample": check_sample,
}
