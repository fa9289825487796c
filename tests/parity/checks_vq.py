"""The tokenizers with codes against their recorded outputs.

Left out are the losses of training (`train_*`), which the library does not have.
"""

from unittest import mock

import flax.linen as nn
import golden as golden_lib
import jax
import jax.numpy as jnp
from checks_kl import NOISE_FACTOR, captured, converter, nchw, nhwc, of

from arcond_jax.convert import lfq as convert_lfq
from arcond_jax.convert import maskgit_vq as convert_maskgit_vq
from arcond_jax.convert import vq16
from arcond_jax.nn import conv, factors
from arcond_jax.tokenizers import lfq, maskgit_vq, vq

# Where its input has channels last, as quantised latents have, PyTorch's GroupNorm takes the
# variance as the mean square minus the squared mean (native/cpu/group_norm_kernel.cpp), and a
# decoder loses up to 6e-4 of its output in float32, seen against float64; ours loses 2e-6. How much
# that is for an archive is measured by `OnePass`. A wrong epsilon or padding gives 5e-3.
DECODER_CAP = 1e-3
DECODED = (
    "recon",
    "decoded",
    "decoded_clamped",
    "code_decoded",
    "indices_decoded",
    "dec_up_last",
    "dec_adaptive_last",
)


class OnePass(conv.GroupNorm):
    """The same with the variance from one pass over the input."""

    @nn.compact
    def __call__(self, x):
        groups = x.reshape(*x.shape[:3], conv.NUM_GROUPS, -1)
        mean = groups.mean(axis=(1, 2, 4), keepdims=True)
        variance = jnp.maximum((groups**2).mean(axis=(1, 2, 4), keepdims=True) - mean**2, 0.0)
        y = ((groups - mean) * jax.lax.rsqrt(variance + conv.EPSILON)).reshape(x.shape)
        if not self.use_affine:
            return y
        one, zero = nn.initializers.ones, nn.initializers.zeros
        shape = x.shape[-1:]
        return y * self.param("scale", one, shape) + self.param("bias", zero, shape)


def compare(golden, network, rows, outputs, *, ignored=()):
    """Every output but the losses; `outputs` is a function of our parameters."""
    convert = converter(network, rows, nhwc(golden.inputs["x"]))

    def checked(compiled):
        return lambda params: compiled(
            convert({k: v for k, v in params.items() if not k.startswith(ignored)})
        )

    def one_pass(params):
        with mock.patch.object(conv, "GroupNorm", OnePass):
            return outputs(params)

    shares = golden_lib.compare(
        golden,
        checked(jax.jit(outputs)),
        noise_factor=NOISE_FACTOR,
        caps=dict.fromkeys(DECODED, DECODER_CAP),
        others=[checked(jax.jit(one_pass))],
    )
    whole = {k for k, v in golden.outputs.items() if v.dtype.kind == "i"}
    assert set(shares) | whole == {k for k in golden.outputs if not k.startswith("train_")}
    return shares


def applied(network, params, function, *args):
    """A function of the bound network."""
    return network.apply({"params": params}, *args, method=function)


def on_grid(codes, image, multipliers):
    """Ids in raster order as the grid of an image."""
    scale = 2 ** (len(multipliers) - 1)
    height, width = (size // scale for size in image.shape[1:3])
    return jnp.asarray(codes, jnp.int32).reshape(-1, height, width)


def check_vq16(golden):
    config, image = golden.config, nhwc(golden.inputs["x"])
    assert config.get("codebook_l2_norm", True), "as in every released model"
    network = vq.VQAutoencoder(
        width=config["ch"],
        multipliers=tuple(config["ch_mult"]),
        num_blocks=config["num_res_blocks"],
        latent_channels=config["z_channels"],
        num_codes=config["codebook_size"],
        code_width=config["codebook_embed_dim"],
    )
    code = on_grid(golden.inputs["code"], image, network.multipliers)

    def outputs(params):
        latents, layers = captured(network, params, "latents", image)
        codes = applied(network, params, "to_codes", image)
        recon = applied(network, params, "__call__", image)
        return {
            "enc_out": of(layers, "encoder"),
            "pre_quant": nchw(latents),
            "distances": applied(network, params, lambda m: m.codebook.distances(latents)).reshape(
                -1, network.num_codes
            ),
            "indices": codes.reshape(-1),
            "quant": nchw(applied(network, params, lambda m: m.codebook.lookup(codes))),
            "recon": nchw(recon),
            "indices_decoded": nchw(recon),
            "code_quant": nchw(applied(network, params, lambda m: m.codebook.lookup(code))),
            "code_decoded": nchw(applied(network, params, "from_codes", code)),
        }

    return compare(golden, network, vq16.rows(network), outputs, ignored=vq16.IGNORED)


def check_maskgit_vqgan(golden):
    config, image = golden.config, nhwc(golden.inputs["x"])
    network = maskgit_vq.MaskGITAutoencoder(
        width=config["hidden_channels"],
        multipliers=tuple(config["channel_mult"]),
        num_blocks=config["num_res_blocks"],
        num_codes=config["num_embeddings"],
        code_width=config["z_channels"],
    )
    code = on_grid(golden.inputs["code"], image, network.multipliers)

    def outputs(params):
        latents = applied(network, params, lambda m: m.encoder(image))
        codes = applied(network, params, "to_codes", 2 * image - 1)
        quant, code_quant = (
            applied(network, params, lambda m, c=c: m.codebook.lookup(c)) for c in (codes, code)
        )
        return {
            "enc_out": nchw(latents),
            "distances": applied(network, params, lambda m: m.codebook.distances(latents)).reshape(
                -1, network.num_codes
            ),
            "indices": codes.reshape(len(image), -1),
            "quant": nchw(quant),
            "code_quant": nchw(code_quant),
            "decoded": nchw(applied(network, params, lambda m: m.decoder(code_quant))),
            "decoded_clamped": nchw((applied(network, params, "from_codes", code) + 1) / 2),
            "recon": nchw(applied(network, params, lambda m: m.decoder(quant))),
        }

    return compare(golden, network, convert_maskgit_vq.rows(network), outputs)


def check_magvit2_tokenizer(golden):
    config, image = golden.config, nhwc(golden.inputs["x"])
    network = lfq.LFQAutoencoder(
        width=config["ch"],
        multipliers=tuple(config["ch_mult"]),
        num_blocks=config["num_res_blocks"],
        num_bits=config["z_channels"],
    )
    sizes, is_factorized = [2**n for n in config["factorized_bits"]], config["token_factorization"]
    if is_factorized:
        pair = [jnp.asarray(golden.inputs[f"code_{part}"], jnp.int32) for part in ("pre", "post")]
        codes = factors.join(jnp.stack(pair, axis=-1), sizes)
        code = on_grid(codes, image, network.multipliers)
    else:
        code = on_grid(golden.inputs["code"], image, network.multipliers)

    def outputs(params):
        latents, encoder = captured(network, params, lambda m, x: m.encoder(x), image)
        codes = applied(network, params, "to_codes", image)
        recon, decoder = captured(network, params, "from_codes", codes)
        last = network.design.last
        if is_factorized:
            pre, post = jnp.moveaxis(factors.split(codes, sizes), -1, 0)
            ids = {"indices_pre": pre.reshape(-1), "indices_post": post.reshape(-1)}
        else:
            ids = {"indices": codes.reshape(-1)}
        return ids | {
            "enc_down0": of(encoder, "encoder", "down_0_downsample"),
            "enc_out": nchw(latents),
            "quant": nchw(lfq.to_signs(codes, network.num_bits)),
            "dec_adaptive_last": of(decoder, "decoder", f"up_{last}_adaptive"),
            "dec_up_last": nchw(
                conv.depth_to_space(nhwc(of(decoder, "decoder", f"up_{last}_upsample")))
            ),
            "recon": nchw(recon),
            "code_quant": nchw(lfq.to_signs(code, network.num_bits)),
            "code_decoded": nchw(applied(network, params, "from_codes", code)),
            "d2s_out": nchw(conv.depth_to_space(nhwc(golden.inputs["d2s"]))),
        }

    return compare(golden, network, convert_lfq.rows(network), outputs)


CHECKS = {
    "vq16": check_vq16,
    "maskgit_vqgan": check_maskgit_vqgan,
    "magvit2_tokenizer": check_magvit2_tokenizer,
}
