"""MAR's KL-16 autoencoder against its recorded outputs."""

import functools

import golden as golden_lib
import jax
import jax.numpy as jnp
import numpy as np

from arcond_jax.convert import kl16, table
from arcond_jax.tokenizers import kl
from arcond_jax.tokenizers import network as network_lib

NOISE_FACTOR = 30.0  # of some twenty convolutions in a row


def nhwc(x):
    return jnp.transpose(x, (0, 2, 3, 1))


def nchw(x):
    return x.transpose(0, 3, 1, 2)


def converter(network, rows, image):
    """From official parameters to ours, having made sure that all of them come back."""
    abstract = network_lib.abstract_params(network, image.shape[1:3])

    def convert(params):
        ours = table.to_ours(rows, params, abstract)
        back = table.to_theirs(rows, ours)
        assert set(back) == set(params)
        for name, array in params.items():
            np.testing.assert_array_equal(back[name], array, err_msg=name)
        return ours

    return convert


def captured(network, params, method, x):
    """A method's result and what every layer gave on the way, by its path."""
    result, state = network.apply({"params": params}, x, method=method, capture_intermediates=True)
    return result, state["intermediates"]


def of(intermediates, *path):
    """What the layer at this path gave."""
    return nchw(functools.reduce(lambda tree, name: tree[name], path, intermediates)["__call__"][0])


def check_kl16(golden):
    config, inputs = golden.config, {name: nhwc(x) for name, x in golden.inputs.items()}
    levels = range(len(config["ch_mult"]))
    network = kl.KLAutoencoder(
        width=config["ch"],
        multipliers=tuple(config["ch_mult"]),
        num_blocks=config["num_res_blocks"],
        latent_channels=config["embed_dim"],
        attention_levels=tuple(i for i in levels if config["resolution"] >> i == 16),
    )
    convert = converter(network, kl16.rows(network), inputs["x"])

    @jax.jit
    def outputs(params):
        moments, encoder = captured(network, params, "moments", inputs["x"])
        decoded, decoder = captured(network, params, "decode", inputs["z"])
        mean, log_variance = kl.split(moments)
        return {
            "enc_down0": of(encoder, "encoder", "down_0_downsample"),
            "enc_mid_attn": of(encoder, "encoder", "mid_1"),
            "enc_out": of(encoder, "encoder"),
            "moments": nchw(moments),
            "mean": nchw(mean),
            "logvar": nchw(log_variance),
            "std": nchw(kl.std(moments)),
            "sample": nchw(kl.sample(moments, inputs["sample_noise"])),
            "kl": kl.divergence(moments),
            "dec_conv_in": of(decoder, "decoder", "conv_in"),
            "dec_up_last": of(decoder, "decoder", f"up_{levels[-1]}_upsample"),
            "decoded": nchw(decoded),
        }

    shares = golden_lib.compare(
        golden, lambda params: outputs(convert(params)), noise_factor=NOISE_FACTOR
    )
    assert set(shares) == set(golden.outputs)
    return shares


CHECKS = {"kl16": check_kl16}
