"""Weights of MAR's KL-16 autoencoder, `kl16.ckpt`: a dict whose "model" is the state dict.

Source: LTH14/mar, models/vae.py, `AutoencoderKL`.
"""

from arcond_jax.convert import blocks, table
from arcond_jax.tokenizers import kl

IGNORED = ("loss.",)  # prefixes of what the training left behind in some copies

MID = ("mid.block_1", "mid.attn_1", "mid.block_2")
ENCODER = blocks.Names(MID, "down.{i}.block.{j}", "down.{i}.attn.{j}", "down.{i}.downsample.conv")
DECODER = blocks.Names(MID, "up.{i}.block.{j}", "up.{i}.attn.{j}", "up.{i}.upsample.conv")


def rows(network: kl.KLAutoencoder) -> list[table.Row]:
    """The whole state dict of an autoencoder of these sizes."""
    return [
        *table.prefixed(blocks.encoder(network.design, ENCODER), "encoder", "encoder"),
        *table.prefixed(blocks.decoder(network.design, DECODER), "decoder", "decoder"),
        *table.pointwise("to_moments", "quant_conv"),
        *table.pointwise("from_latents", "post_quant_conv"),
    ]
