"""Weights of MAR: LTH14/mar, models/mar.py and models/diffloss.py."""

from arcond_jax.convert import table
from arcond_jax.models import diffusion_head, mar


def rows(network: mar.MAR) -> list[table.Row]:
    """The table of a network's parameters."""
    depth = network.decoder_depth
    return [
        table.Row("class_embed/table", ("class_emb.weight", "fake_latent"), join="last row"),
        *table.linear("token_in", "z_proj"),
        *table.norm("input_norm", "z_proj_ln"),
        table.row("encoder_position", "encoder_pos_embed_learned", table.leading(1)),
        *table.stacked(_block(), "encoder", "encoder_blocks.{i}", network.encoder_depth),
        *table.norm("encoder_norm", "encoder_norm"),
        *table.linear("decoder_in", "decoder_embed"),
        table.row("mask_token", "mask_token", table.leading(2)),
        table.row("decoder_position", "decoder_pos_embed_learned", table.leading(1)),
        *table.stacked(_block(), "decoder", "decoder_blocks.{i}", depth - 1),
        *table.prefixed(_block(), "decoder_last", f"decoder_blocks.{depth - 1}"),
        *table.norm("decoder_norm", "decoder_norm"),
        table.row("head_position", "diffusion_pos_embed_learned", table.leading(1)),
        *table.prefixed(head_rows(network.head), "denoiser", "diffloss.net"),
    ]


def _block() -> list[table.Row]:
    """timm's vision transformer block."""
    return [
        *table.norm("attention_norm", "norm1"),
        *table.linear("qkv", "attn.qkv"),
        *table.linear("out", "attn.proj"),
        *table.norm("mlp_norm", "norm2"),
        *table.linear("mlp/Linear_0", "mlp.fc1"),
        *table.linear("mlp/Linear_1", "mlp.fc2"),
    ]


def head_rows(head: diffusion_head.DiffusionHead) -> list[table.Row]:
    """The denoising MLP alone, `SimpleMLPAdaLN`."""
    rows = [
        *table.linear("time_0", "time_embed.mlp.0"),
        *table.linear("time_1", "time_embed.mlp.2"),
        *table.linear("cond", "cond_embed"),
        *table.linear("input", "input_proj"),
        *table.linear("final_modulation", "final_layer.adaLN_modulation.1"),
        *table.linear("output", "final_layer.linear"),
    ]
    for i in range(head.depth):
        block = [
            *table.norm("norm", "in_ln"),
            *table.linear("mlp_0", "mlp.0"),
            *table.linear("mlp_1", "mlp.2"),
            *table.linear("modulation", "adaLN_modulation.1"),
        ]
        rows += table.prefixed(block, f"block_{i}", f"res_blocks.{i}")
    return rows
