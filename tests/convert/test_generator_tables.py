"""Tables of the code models at their released sizes: names, shapes and counts are the official."""

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import pytest

from arcond_jax.convert import llamagen, magvit2, table
from arcond_jax.convert import rar as rar_table
from arcond_jax.models import causal, diffusion_head, gpt, joint, prompted, rar
from arcond_jax.models import llamagen as llamagen_model
from arcond_jax.models import magvit2 as magvit2_model

GRID, NUM_CLASSES = (16, 16), 1000

# Tensors and numbers of the official modules, counted from them with the released sizes. The papers
# round to 111M, 343M, 775M, 1.4B (LlamaGen), 261M, 461M, 955M, 1.5B (RAR) and 343M, 804M, 1.5B
# (Open-MAGVIT2).
OFFICIAL = {
    ("llamagen", "B"): (88, 110_888_448),
    ("llamagen", "L"): (172, 342_910_976),
    ("llamagen", "XL"): (256, 774_699_520),
    ("llamagen", "XXL"): (340, 1_410_972_672),
    ("llamagen_t2i", "XL"): (258, 777_923_840),  # 245,760 of them a buffer, the missing caption
    ("rar", "B"): (441, 260_923_648),
    ("rar", "L"): (441, 461_668_352),
    ("rar", "XL"): (585, 955_425_024),
    ("rar", "XXL"): (729, 1_498_520_704),
    ("magvit2", "B"): (188, 343_570_432),
    ("magvit2", "L"): (279, 804_362_240),
    ("magvit2", "XL"): (370, 1_486_679_040),
}


def abstract_params(network):
    """Shapes of the parameters."""
    init = causal.Generator(network, losses=()).init
    return nn.unbox(jax.eval_shape(init, jax.random.key(0)))


def made(family, size):
    """Rows of a table and the shapes they are for."""
    if family == "rar":
        network = rar.RAR(GRID, num_codes=1024, num_classes=NUM_CLASSES, **rar.SIZES[size])
        rows = rar_table.rows(network)
    elif family == "magvit2":
        sizes = dict(magvit2_model.SIZES[size])
        intra_depth = sizes.pop("intra_depth")
        network = magvit2_model.MAGVIT2(
            backbone=gpt.GPT(grid=GRID, **sizes), num_classes=NUM_CLASSES, intra_depth=intra_depth
        )
        rows = magvit2.rows(network)
    else:
        is_captioned = family == "llamagen_t2i"
        num_prefix = prompted.NUM_CAPTION_VECTORS if is_captioned else 1
        network = llamagen_model.LlamaGen(
            backbone=gpt.GPT(grid=GRID, num_prefix=num_prefix, **gpt.SIZES[size]),
            num_classes=None if is_captioned else NUM_CLASSES,
            num_codes=16384,
        )
        rows = llamagen.rows(network)
    return rows, abstract_params(network)


def smallest(family, size):
    return size == "B" or family == "llamagen_t2i"


# The larger ones have more layers, and wider ones, by the same rows.
@pytest.mark.parametrize(
    ("family", "size"),
    [pytest.param(*x, marks=[] if smallest(*x) else [pytest.mark.slow]) for x in OFFICIAL],
)
def test_tables_hold_what_the_official_modules_hold(family, size):
    rows, abstract = made(family, size)
    shapes = table.their_shapes(rows, abstract)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert (len(shapes), count) == OFFICIAL[family, size]
    assert count == sum(x.size for x in jax.tree.leaves(abstract))
    ours = [row.ours for row in rows]
    assert sorted(ours) == sorted(flax.traverse_util.flatten_dict(abstract, sep="/"))


def test_names_in_a_released_checkpoint_have_a_prefix():
    backbone = gpt.GPT(depth=1, width=16, num_heads=2, grid=(2, 2))
    network = magvit2_model.MAGVIT2(
        backbone=backbone, num_classes=3, factor_sizes=(4, 8), intra_depth=1
    )
    plain, prefixed = magvit2.rows(network), magvit2.rows(network, magvit2.PREFIX)
    for row, released in zip(plain, prefixed, strict=True):
        assert released.ours == row.ours
        assert released.theirs == tuple(f"transformer.{name}" for name in row.theirs)
        assert not any(name.startswith(magvit2.IGNORED) for name in released.theirs)


def test_queries_keys_and_values_are_laid_out_head_by_head():
    kv_heads, groups, head_dim, width = 2, 3, 4, 5
    heads = kv_heads * groups
    shape = (width, kv_heads, groups + 2, head_dim)
    official = np.random.default_rng(0).normal(size=((heads + 2 * kv_heads) * head_dim, width))
    ours = llamagen.GROUPED_QKV.to_ours(official, shape)
    np.testing.assert_array_equal(llamagen.GROUPED_QKV.to_theirs(ours), official)
    queries, keys, values = np.split(official, [heads * head_dim, (heads + kv_heads) * head_dim])
    for head in range(heads):
        rows = queries[head * head_dim : (head + 1) * head_dim]
        np.testing.assert_array_equal(ours[:, head // groups, head % groups], rows.T)
    for head in range(kv_heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        np.testing.assert_array_equal(ours[:, head, groups], keys[rows].T)
        np.testing.assert_array_equal(ours[:, head, groups + 1], values[rows].T)


@pytest.mark.parametrize("num_layers", [None, 2])
@pytest.mark.parametrize("join", ["one", "last row", "side by side"])
def test_joined_tensors_come_apart_again(join, num_layers):
    rng = np.random.default_rng(0)
    parts = {"one": [(4, 3)], "last row": [(4, 3), (1, 3)], "side by side": [(4, 3), (4, 3)]}[join]
    layers = range(num_layers or 1)
    names = tuple(f"{i}.{j}" for i in layers for j in range(len(parts)))
    state = {
        f"{i}.{j}": rng.normal(size=shape).astype(np.float32)
        for i in layers
        for j, shape in enumerate(parts)
    }
    shape = {"one": (4, 3), "last row": (5, 3), "side by side": (4, 2, 3)}[join]
    rows = [table.Row("x", names, table.PLAIN, join, num_layers)]
    abstract = {"x": np.zeros(shape if num_layers is None else (num_layers, *shape))}
    ours = table.to_ours(rows, state, abstract)
    assert ours["x"].shape == abstract["x"].shape
    back = table.to_theirs(rows, ours)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("num_codes", [8, None])
def test_models_of_latents_are_not_llamagen(num_codes):
    backbone = gpt.GPT(depth=1, width=16, num_heads=2, grid=(2, 2))
    head = diffusion_head.DiffusionHead(channels=4, depth=1, width=8)
    network = joint.Joint(backbone=backbone, num_classes=3, head=head, num_codes=num_codes)
    with pytest.raises(table.ConvertError, match="the parameters and the table differ in"):
        table.their_shapes(llamagen.rows(network), abstract_params(network))
