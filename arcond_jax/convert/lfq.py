"""Weights of Open-MAGVIT2's tokenizers: a dict whose "state_dict" holds them twice.

The training weights are under their names, and averages over the training, which evaluation uses,
under "model_ema." and the name without its dots.

Source: TencentARC/SEED-Voken, src/Open_MAGVIT2/models/lfqgan.py and modules/ema.py.
"""

from collections.abc import Sequence

from arcond_jax.convert import blocks, table
from arcond_jax.tokenizers import lfq

IGNORED = ("loss.", "model_ema.")


def rows(network: lfq.LFQAutoencoder) -> list[table.Row]:
    """The encoder and decoder of a tokenizer of these sizes."""
    mid = tuple(f"mid_block.{j}" for j in range(network.num_blocks))
    encoder = blocks.Names(mid, "down.{i}.block.{j}", resample="down.{i}.downsample")
    decoder = blocks.Names(
        mid, "up.{i}.block.{j}", resample="up.{i}.upsample.conv1", adaptive="adaptive.{i}"
    )
    return [
        *table.prefixed(blocks.encoder(network.design, encoder), "encoder", "encoder"),
        *table.prefixed(blocks.decoder(network.design, decoder), "decoder", "decoder"),
    ]


def averaged(rows: Sequence[table.Row], state: table.StateDict) -> table.StateDict:
    """The averages under the names of the training weights.

    Raises:
      ConvertError: The file holds no averages, or not all.
    """
    names = {name: f"model_ema.{name.replace('.', '')}" for r in rows for name in r.theirs}
    missing = [theirs for theirs in names.values() if theirs not in state]
    if missing:
        raise table.ConvertError(
            f"the weights lack {missing[0]} and {len(missing) - 1} more averages: convert the"
            " training weights instead"
        )
    return {name: state[theirs] for name, theirs in names.items()}
