"""Weights of RAR: bytedance/1d-tokenizer, modeling/rar.py, `rar_b.bin` and so on, state dicts."""

from arcond_jax.convert import table
from arcond_jax.models import rar


def rows(network: rar.RAR) -> list[table.Row]:
    """The table of a network's parameters."""
    return [
        table.row("start_token", "cls_token", table.leading(2)),
        table.row("embed/table", "embeddings.weight"),
        table.row("position", "pos_embed", table.leading(1)),
        table.row("next_position", "target_aware_pos_embed", table.leading(1)),
        table.row("modulator_position", "timesteps_embeddings", table.leading(1)),
        *table.stacked(_block(), "blocks", "blocks.{i}", network.depth),
        *table.linear("final_modulation", "adaln_before_head.adaLN_modulation.1"),
        *table.linear("code_head", "lm_head"),
    ]


def _block() -> list[table.Row]:
    return [
        *table.norm("attention_norm", "norm1"),
        *table.linear("qkv", "attn.qkv"),
        *table.norm("query_norm", "attn.q_norm"),
        *table.norm("key_norm", "attn.k_norm"),
        *table.linear("out", "attn.proj"),
        *table.norm("mlp_norm", "norm2"),
        *table.linear("mlp/Linear_0", "mlp.fc1"),
        *table.linear("mlp/Linear_1", "mlp.fc2"),
        *table.linear("modulation", "adaLN_modulation.1"),
    ]
