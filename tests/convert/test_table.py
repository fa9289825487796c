"""The machine behind the weight tables: exact both ways, and strict on both sides."""

import jax
import numpy as np
import pytest

from arcond_jax.convert import table

ROWS = [
    *table.linear("in", "a.fc"),
    *table.stacked(table.linear("qkv", "attn.qkv"), "blocks", "blocks.{i}", 3),
    *table.conv("conv", "c"),
    *table.pointwise("point", "p"),
    table.row("position", "pos", table.leading(1)),
    table.Row("classes", ("emb.weight", "none"), join="last row"),
]
SHAPES = {
    "in": {"kernel": (4, 6), "bias": (6,)},
    "blocks": {"qkv": {"kernel": (3, 4, 3, 2, 2), "bias": (3, 3, 2, 2)}},
    "conv": {"kernel": (3, 2, 4, 5), "bias": (5,)},
    "point": {"kernel": (4, 7), "bias": (7,)},
    "position": (9, 4),
    "classes": (11, 4),
}
ABSTRACT = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
)
THEIRS = {
    "a.fc.weight": (6, 4),
    "a.fc.bias": (6,),
    **{f"blocks.{i}.attn.qkv.weight": (12, 4) for i in range(3)},
    **{f"blocks.{i}.attn.qkv.bias": (12,) for i in range(3)},
    "c.weight": (5, 4, 3, 2),
    "c.bias": (5,),
    "p.weight": (7, 4, 1, 1),
    "p.bias": (7,),
    "pos": (1, 9, 4),
    "emb.weight": (10, 4),
    "none": (1, 4),
}


@pytest.fixture
def state():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in THEIRS.items()}


def test_shapes_are_known_without_weights():
    assert table.their_shapes(ROWS, ABSTRACT) == THEIRS


def test_there_and_back_is_exact(state):
    ours = table.to_ours(ROWS, state, ABSTRACT)
    assert jax.tree.map(np.shape, ours) == SHAPES
    back = table.to_theirs(ROWS, ours)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)


def test_a_linear_map_computes_the_same(state):
    """Checked by what it does, not by another transpose."""
    ours = table.to_ours(ROWS, state, ABSTRACT)
    x = np.arange(4, dtype=np.float32)
    expected = state["a.fc.weight"] @ x + state["a.fc.bias"]
    np.testing.assert_allclose(x @ ours["in"]["kernel"] + ours["in"]["bias"], expected, rtol=1e-6)
    block = ours["blocks"]["qkv"]
    heads = np.tensordot(x, block["kernel"][1], axes=1) + block["bias"][1]
    flat = state["blocks.1.attn.qkv.weight"] @ x + state["blocks.1.attn.qkv.bias"]
    np.testing.assert_allclose(heads, flat.reshape(3, 2, 2), rtol=1e-5)


def test_half_precision_is_widened(state):
    state["pos"] = state["pos"].astype(np.float16)
    ours = table.to_ours(ROWS, state, ABSTRACT)
    assert ours["position"].dtype == np.float32
    np.testing.assert_array_equal(ours["position"], state["pos"][0].astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c.bias": None}, "the weights lack c.bias: they are of another model"),
        ({"c.bias": None, "pos": None}, "the weights lack c.bias and 1 more"),
        ({"more": np.ones(3)}, "the weights have more too many: they are of another model"),
        (
            {"pos": np.ones((1, 9, 5), np.float32)},
            r"pos is \(1, 9, 5\) in the weights and \(1, 9, 4\) in the model: .* another size",
        ),
        ({"c.bias": np.ones(5, np.int64)}, "c.bias holds int64, not floats"),
        (
            {"c.bias": np.float32([0, np.nan, -np.inf, 1, 2])},
            "2 of 5 numbers are not finite in c.bias: the training diverged or",
        ),
        (
            {"c.bias": np.full(5, np.inf), "p.bias": np.full(7, np.nan)},
            "5 of 5 numbers are not finite in c.bias and 1 more",
        ),
    ],
)
def test_other_weights_are_refused(state, change, message):
    state = {name: x for name, x in (state | change).items() if x is not None}
    with pytest.raises(table.ConvertError, match=message) as raised:
        table.to_ours(ROWS, state, ABSTRACT)
    assert "\n" not in str(raised.value)


def test_a_parameter_that_the_table_forgot_is_an_error(state):
    abstract = ABSTRACT | {"new": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(table.ConvertError, match="the parameters and the table differ in new"):
        table.to_ours(ROWS, state, abstract)
