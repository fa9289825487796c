"""Weights of an official PyTorch model to ours and back, by a table with one row per parameter.

A family's table is a list of `Row`: our name, the official name or names, and how the numbers lie
in each. Nothing is guessed and nothing is skipped: a name that is left over on either side is an
error, and so is a shape. The same rows run backwards give the official state dict again, bit for
bit.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.traverse_util
import jax
import numpy as np

Array = np.ndarray
StateDict = Mapping[str, Array]  # official names to arrays in PyTorch's layout


class ConvertError(ValueError):
    """Weights that are not those of the model they are read for; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one official tensor becomes ours and back.

    Attributes:
      to_ours: From the official tensor and the shape wanted here.
      to_theirs: The exact inverse, from our array alone.
    """

    to_ours: Callable[[Array, tuple[int, ...]], Array]
    to_theirs: Callable[[Array], Array]


def leading(num_axes: int) -> Layout:
    """Official tensors with leading axes of size 1, such as position tables [1, l, d]."""
    return Layout(
        lambda x, shape: x.reshape(x.shape[num_axes:]),
        lambda x: x.reshape((1,) * num_axes + x.shape),
    )


PLAIN = Layout(lambda x, shape: x, lambda x: x)
# Linear [out, in] to [in, *features].
LINEAR = Layout(lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(x.shape[0], -1).T)
# The bias of such a map, [out] to features.
BIAS = Layout(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
# Conv2d [out, in, height, width] to [height, width, in, out].
CONV = Layout(lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# Conv2d of 1x1 [out, in, 1, 1] to a matrix [in, *features].
POINTWISE = Layout(
    lambda x, shape: x[:, :, 0, 0].T.reshape(shape),
    lambda x: x.reshape(x.shape[0], -1).T[:, :, None, None],
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our parameters and the official tensors it is made of.

    Attributes:
      ours: Path in our tree, joined by "/".
      theirs: Official names; layer by layer if there are layers.
      layout: Applied to each official tensor.
      join: How the tensors of a layer become one array: "last row" for a table whose last row is
        apart there, "side by side" for maps of one input that are one matrix [in, maps, out] here.
      num_layers: Layers under a scan; None without one.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = PLAIN
    join: Literal["one", "last row", "side by side"] = "one"
    num_layers: int | None = None


def row(ours: str, theirs: str, layout: Layout = PLAIN) -> Row:
    """A parameter made of one official tensor."""
    return Row(ours, (theirs,), layout)


def linear(ours: str, theirs: str, *, use_bias: bool = True) -> list[Row]:
    """An affine map: `nn.Linear` there, `linear.Linear` here."""
    rows = [row(f"{ours}/kernel", f"{theirs}.weight", LINEAR)]
    return [*rows, row(f"{ours}/bias", f"{theirs}.bias", BIAS)] if use_bias else rows


def norm(ours: str, theirs: str, *, use_bias: bool = True) -> list[Row]:
    """Scale and bias of a normalisation."""
    rows = [row(f"{ours}/scale", f"{theirs}.weight")]
    return [*rows, row(f"{ours}/bias", f"{theirs}.bias")] if use_bias else rows


def conv(ours: str, theirs: str, *, use_bias: bool = True) -> list[Row]:
    """A two-dimensional convolution: `nn.Conv2d` there, `conv.Conv` here."""
    rows = [row(f"{ours}/kernel", f"{theirs}.weight", CONV)]
    return [*rows, row(f"{ours}/bias", f"{theirs}.bias")] if use_bias else rows


def pointwise(ours: str, theirs: str) -> list[Row]:
    """A convolution of 1x1 that is a matrix here."""
    return [
        row(f"{ours}/kernel", f"{theirs}.weight", POINTWISE),
        row(f"{ours}/bias", f"{theirs}.bias", BIAS),
    ]


def stacked(rows: Iterable[Row], ours: str, theirs: str, count: int) -> list[Row]:
    """Rows of one block, for `count` blocks that lie under one scan here.

    Args:
      rows: Of a block, relative to `ours` and `theirs`.
      theirs: Prefix with `{i}` for the number of the block.
    """
    return [
        dataclasses.replace(
            r,
            ours=f"{ours}/{r.ours}",
            theirs=tuple(f"{theirs.format(i=i)}.{t}" for i in range(count) for t in r.theirs),
            num_layers=count,
        )
        for r in rows
    ]


def prefixed(rows: Iterable[Row], ours: str, theirs: str) -> list[Row]:
    """Rows of a part, put into the model it belongs to; a prefix may be empty."""

    def join(prefix: str, name: str, by: str) -> str:
        return f"{prefix}{by}{name}" if prefix else name

    return [
        dataclasses.replace(
            r, ours=join(ours, r.ours, "/"), theirs=tuple(join(theirs, t, ".") for t in r.theirs)
        )
        for r in rows
    ]


def their_shapes(rows: Sequence[Row], abstract: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official state dict of a tree of shapes.

    Raises:
      ConvertError: The tree is not the one the table describes.
    """
    # Zeros that take no memory go through the same code as weights do.
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), abstract)
    return {name: part.shape for name, part in _their_parts(rows, zeros)}


def to_ours(rows: Sequence[Row], state: StateDict, abstract: Any) -> Any:
    """The tree of our parameters, float32.

    Args:
      state: The whole official state dict and nothing else.
      abstract: Tree of the shapes wanted, from `jax.eval_shape`.

    Raises:
      ConvertError: A tensor is missing, left over, of another shape, or not of finite floats.
    """
    shapes = their_shapes(rows, abstract)
    missing, extra = sorted(shapes.keys() - state), sorted(state.keys() - shapes)
    if missing:
        raise ConvertError(f"the weights lack {_some(missing)}: they are of another model")
    if extra:
        raise ConvertError(f"the weights have {_some(extra)} too many: they are of another model")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ConvertError(
                f"{name} is {state[name].shape} in the weights and {shape} in the model: they are "
                "of another size than the config"
            )
        if not np.issubdtype(state[name].dtype, np.floating):
            raise ConvertError(f"{name} holds {state[name].dtype}, not floats")
    _check_finite({name: state[name] for name in shapes})
    wanted = _flat(abstract)
    made = {r.ours: _one(r, state, wanted[r.ours].shape) for r in rows}
    return flax.traverse_util.unflatten_dict(made, sep="/")


def to_theirs(rows: Sequence[Row], params: Any) -> dict[str, Array]:
    """The official state dict of our parameters; undoes `to_ours` exactly.

    Raises:
      ConvertError: The tree is not the one the table describes.
    """
    arrays = jax.tree.map(lambda x: np.asarray(jax.device_get(x)), params)
    return {name: np.ascontiguousarray(part) for name, part in _their_parts(rows, arrays)}


def _check_finite(state: StateDict) -> None:
    counts = {name: x.size - int(np.isfinite(x).sum()) for name, x in state.items()}
    broken = [name for name, count in counts.items() if count]
    if broken:
        raise ConvertError(
            f"{counts[broken[0]]} of {state[broken[0]].size} numbers are not finite in "
            f"{_some(broken)}: the training diverged or the file is damaged, take other weights"
        )


def _their_parts(rows: Sequence[Row], params: Any) -> Iterator[tuple[str, Array]]:
    ours = _flat(params)
    unnamed = sorted(set(ours) ^ {r.ours for r in rows})
    if unnamed:
        raise ConvertError(f"the parameters and the table differ in {_some(unnamed)}")
    for r in rows:
        array = ours[r.ours]
        layers = [array] if r.num_layers is None else list(array)
        parts = [part for layer in layers for part in _split(layer, r.join)]
        for name, part in zip(r.theirs, parts, strict=True):
            yield name, r.layout.to_theirs(part)


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by their paths, joined by "/"."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def _split(array: Array, join: str) -> list[Array]:
    if join == "last row":
        return [array[:-1], array[-1:]]
    return list(np.moveaxis(array, 1, 0)) if join == "side by side" else [array]


def _joined(parts: Sequence[Array], join: str) -> Array:
    """Undoes `_split`."""
    if join == "last row":
        return np.concatenate(parts)
    return np.stack(parts, axis=1) if join == "side by side" else parts[0]


def _one(r: Row, state: StateDict, shape: tuple[int, ...]) -> Array:
    layer_shape = shape if r.num_layers is None else shape[1:]
    inner = layer_shape
    if r.join == "side by side":
        inner = layer_shape[:1] + layer_shape[2:]
    parts = [r.layout.to_ours(state[name].astype(np.float32), inner) for name in r.theirs]
    if r.num_layers is None:
        return np.ascontiguousarray(_joined(parts, r.join))
    if r.num_layers == 0:  # MAR's decoder of one block has none under its scan
        return np.zeros(shape, np.float32)
    size = len(parts) // r.num_layers
    return np.stack([_joined(parts[i : i + size], r.join) for i in range(0, len(parts), size)])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
