"""Weights of LlamaGen: FoundationVision/LlamaGen, autoregressive/models/gpt.py, class to image."""

import numpy as np

from arcond_jax.convert import table
from arcond_jax.models import joint

IGNORED = ("freqs_cis",)  # the table of positions, which early checkpoints hold


def rows(network: joint.Joint) -> list[table.Row]:
    """The table of a network of codes alone with window 1.

    Raises:
      ValueError: The network has a window or a diffusion head, which LlamaGen has not.
    """
    if network.head is not None or network.num_codes is None or network.window != 1:
        raise ValueError("LlamaGen has codes alone, one at each position: head None, window 1")
    return [
        table.row("class_embed/table", "cls_embedding.embedding_table.weight"),
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
