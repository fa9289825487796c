"""Weights of LlamaGen's tokenizers, `vq_ds16_c2i.pt`: a dict whose "model" is the state dict.

Source: FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py, `VQModel`.
"""

from arcond_jax.convert import blocks, table
from arcond_jax.tokenizers import vq

IGNORED = ("quantize.codebook_used",)  # the last codes seen in training; no weight

MID = ("mid.0", "mid.1", "mid.2")
ENCODER = blocks.Names(
    MID,
    "conv_blocks.{i}.res.{j}",
    "conv_blocks.{i}.attn.{j}",
    "conv_blocks.{i}.downsample.conv",
)
# The decoder counts from the lowest resolution.
DECODER = blocks.Names(
    MID, "conv_blocks.{r}.res.{j}", "conv_blocks.{r}.attn.{j}", "conv_blocks.{r}.upsample.conv"
)


def rows(network: vq.VQAutoencoder) -> list[table.Row]:
    """The state dict of a tokenizer of these sizes, but for `IGNORED`."""
    return [
        *table.prefixed(blocks.encoder(network.design, ENCODER), "encoder", "encoder"),
        *table.prefixed(blocks.decoder(network.design, DECODER), "decoder", "decoder"),
        *table.pointwise("to_code", "quant_conv"),
        *table.pointwise("from_code", "post_quant_conv"),
        table.row("codebook/table", "quantize.embedding.weight"),
    ]
