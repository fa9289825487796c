"""Tables of the blocks that the convolutional tokenizers share, ours beside the official names.

`encoder` and `decoder` walk a `conv.Design` as the network does; `Names` holds what a family calls
its parts. Prefixes are the caller's.
"""

import dataclasses

from arcond_jax.convert import table
from arcond_jax.nn import conv


@dataclasses.dataclass(frozen=True)
class Names:
    """Official names of the parts of an encoder or a decoder.

    In each, {i} stands for the level, 0 at full resolution; {r} for the level counted from the
    lowest resolution; {j} for the number of the block in its level.
    """

    mid: tuple[str, ...]
    block: str
    attention: str = ""
    resample: str = ""
    adaptive: str = ""


def res_block(
    ours: str, theirs: str, *, use_bias: bool = True, has_shortcut: bool = False
) -> list[table.Row]:
    """Two normalised convolutions, and a 1x1 convolution where channels change."""
    rows = [
        *table.norm("norm_0", "norm1"),
        *table.conv("conv_0", "conv1", use_bias=use_bias),
        *table.norm("norm_1", "norm2"),
        *table.conv("conv_1", "conv2", use_bias=use_bias),
    ]
    if has_shortcut:
        rows += table.conv("shortcut", "nin_shortcut", use_bias=use_bias)
    return table.prefixed(rows, ours, theirs)


def attention(ours: str, theirs: str) -> list[table.Row]:
    """Attention of one head, whose four 1x1 convolutions are matrices here."""
    rows = [
        *table.norm("norm", "norm"),
        *table.pointwise("queries", "q"),
        *table.pointwise("keys", "k"),
        *table.pointwise("values", "v"),
        *table.pointwise("out", "proj_out"),
    ]
    return table.prefixed(rows, ours, theirs)


def encoder(design: conv.Design, names: Names) -> list[table.Row]:
    """All of `conv.Encoder`, without a prefix."""
    rows = [*table.conv("conv_in", "conv_in", use_bias=design.use_bias), *_mid(design, names)]
    width = design.width
    for i in range(design.last + 1):
        rows += _level(design, names, i, "down", design.num_blocks, width)
        width = design.channels(i)
        if i < design.last and design.down_padding is not None:
            rows += table.conv(f"down_{i}_downsample", names.resample.format(i=i))
    return rows + _out()


def decoder(design: conv.Design, names: Names) -> list[table.Row]:
    """All of `conv.Decoder`, without a prefix."""
    rows = [*table.conv("conv_in", "conv_in"), *_mid(design, names)]
    width = design.channels(design.last)
    for i in reversed(range(design.last + 1)):
        if design.adaptive:
            theirs = names.adaptive.format(i=i)
            rows += table.linear(f"up_{i}_adaptive/scale", f"{theirs}.gamma")
            rows += table.linear(f"up_{i}_adaptive/shift", f"{theirs}.beta")
        rows += _level(design, names, i, "up", design.num_blocks + design.extra_blocks, width)
        width = design.channels(i)
        if i > 0:
            theirs = names.resample.format(i=i, r=design.last - i)
            rows += table.conv(f"up_{i}_upsample", theirs)
    return rows + _out()


def _level(
    design: conv.Design, names: Names, i: int, side: str, num_blocks: int, width: int
) -> list[table.Row]:
    """Blocks of one level that is given `width` channels."""
    with_attention = design.encoder_attention if side == "down" else design.decoder_attention
    rows = []
    for j in range(num_blocks):
        place = dict(i=i, r=design.last - i, j=j)
        rows += res_block(
            f"{side}_{i}_block_{j}",
            names.block.format(**place),
            use_bias=design.use_bias,
            has_shortcut=j == 0 and width != design.channels(i),
        )
        if i in with_attention:
            rows += attention(f"{side}_{i}_attention_{j}", names.attention.format(**place))
    return rows


def _mid(design: conv.Design, names: Names) -> list[table.Row]:
    rows = []
    for i, (kind, theirs) in enumerate(zip(design.mid, names.mid, strict=True)):
        if kind == "block":
            rows += res_block(f"mid_{i}", theirs, use_bias=design.use_bias)
        else:
            rows += attention(f"mid_{i}", theirs)
    return rows


def _out() -> list[table.Row]:
    return [*table.norm("norm_out", "norm_out"), *table.conv("conv_out", "conv_out")]
