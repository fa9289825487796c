"""Weights of RAR's tokenizer, `maskgit-vqgan-imagenet-f16-256.bin`, a state dict.

Source: bytedance/1d-tokenizer, modeling/titok.py, `PretrainedTokenizer`.
"""

from arcond_jax.convert import blocks, table
from arcond_jax.tokenizers import maskgit_vq


def rows(network: maskgit_vq.MaskGITAutoencoder) -> list[table.Row]:
    """The whole state dict of a tokenizer of these sizes."""
    mid = tuple(f"mid.{j}" for j in range(network.num_blocks))
    encoder = blocks.Names(mid, "down.{i}.block.{j}")
    decoder = blocks.Names(mid, "up.{i}.block.{j}", resample="up.{i}.upsample_conv")
    return [
        *table.prefixed(blocks.encoder(network.design, encoder), "encoder", "encoder"),
        *table.prefixed(blocks.decoder(network.design, decoder), "decoder", "decoder"),
        table.row("codebook/table", "quantize.embedding.weight"),
    ]
