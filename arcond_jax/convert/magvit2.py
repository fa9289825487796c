"""Weights of Open-MAGVIT2's generator: TencentARC/SEED-Voken, modules/transformer/gpt.py.

A released checkpoint is a dict whose "state_dict" holds them beside those of the tokenizer.
"""

from arcond_jax.convert import llamagen, table
from arcond_jax.models import magvit2

IGNORED = ("first_stage_model.", "cond_stage_model.")  # the tokenizer, and a rule with no weights
PREFIX = "transformer"  # of the generator in a released checkpoint


def rows(network: magvit2.MAGVIT2, prefix: str = "") -> list[table.Row]:
    """The table of a network's parameters.

    Args:
      prefix: `PREFIX` for a released checkpoint.
    """
    rows = [
        table.row("class_embed/table", "class_emb.embedding_table.weight"),
        *table.stacked(
            llamagen.block(), "trunk/blocks", "spatial_blocks.{i}", network.backbone.depth
        ),
        *table.stacked(
            llamagen.block(), "intra/blocks", "factorized_blocks.{i}", network.intra_depth
        ),
        *table.norm("final_norm", "norm", use_bias=False),
    ]
    for i, name in enumerate(("pre_emb", "post_emb")):
        rows.append(table.row(f"factor_embed_{i}/table", f"{name}.weight"))
        rows += table.linear(f"factor_head_{i}", f"head.{i}", use_bias=False)
    return table.prefixed(rows, "", prefix)
