"""Weights of LlamaGen: FoundationVision/LlamaGen, autoregressive/models/gpt.py."""

import numpy as np

from arcond_jax.convert import table
from arcond_jax.models import llamagen

POSITIONS = "freqs_cis"  # the table of positions, which early checkpoints hold; no weight
IGNORED = (POSITIONS,)
STRIDE = 16  # pixels per code along an edge, in all released models


def rows(network: llamagen.LlamaGen) -> list[table.Row]:
    """The table of a network's parameters, from class to image or from text to image."""
    prompt = [table.row("class_embed/table", "cls_embedding.embedding_table.weight")]
    if network.num_classes is None:
        prompt = [
            *table.linear("cap_proj/Linear_0", "cls_embedding.cap_proj.fc1", use_bias=False),
            *table.linear("cap_proj/Linear_1", "cls_embedding.cap_proj.fc2", use_bias=False),
            table.row("no_caption", "cls_embedding.uncond_embedding"),
        ]
    return [
        *prompt,
        table.row("code_embed/table", "tok_embeddings.weight"),
        *table.stacked(block(), "trunk/blocks", "layers.{i}", network.backbone.depth),
        *table.norm("final_norm", "norm", use_bias=False),
        *table.linear("code_head", "output", use_bias=False),
    ]


def block() -> list[table.Row]:
    """A block of `gpt.GPT` without normalised queries; Open-MAGVIT2's has the same names."""
    gate_and_value = ("feed_forward.w1.weight", "feed_forward.w3.weight")
    return [
        *table.norm("attention_norm", "attention_norm", use_bias=False),
        table.row("qkv/kernel", "attention.wqkv.weight", GROUPED_QKV),
        *table.linear("out", "attention.wo", use_bias=False),
        *table.norm("mlp_norm", "ffn_norm", use_bias=False),
        table.Row("mlp/Linear_0/kernel", gate_and_value, table.LINEAR, "side by side"),
        *table.linear("mlp/Linear_1", "feed_forward.w2", use_bias=False),
    ]


def _qkv_to_ours(x: table.Array, shape: tuple[int, ...]) -> table.Array:
    width, kv_heads, _, head_dim = shape
    size = kv_heads * head_dim
    parts = np.split(x.T, [-2 * size, -size], axis=1)
    return np.concatenate([p.reshape(width, kv_heads, -1, head_dim) for p in parts], axis=2)


def _qkv_to_theirs(x: table.Array) -> table.Array:
    parts = np.split(x, [-2, -1], axis=2)
    return np.concatenate([p.reshape(len(x), -1) for p in parts], axis=1).T


# All queries, then all keys, then all values [out, in] to each key-value head beside its queries
# [in, kv heads, queries and 2, head dim].
GROUPED_QKV = table.Layout(_qkv_to_ours, _qkv_to_theirs)
