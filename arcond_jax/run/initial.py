"""Starting from trained weights: the same model with other classes, or at another image size.

All shapes are compared before anything is computed or written.
"""

import dataclasses
import logging
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float

from arcond_jax import build, types
from arcond_jax.build import family
from arcond_jax.build import saved as saved_lib
from arcond_jax.models import tensorar
from arcond_jax.run import restoring
from arcond_jax.tokenizers import patches

Classes = Literal["new", "keep"]


@dataclasses.dataclass(frozen=True)
class Initial:
    """What a run starts from.

    Attributes:
      workdir: A run or converted weights.
      classes: "new" for a fresh table of classes, "keep" for that of the weights; None keeps it
        where number and names of the classes are the same, and refuses where they are not.
    """

    workdir: epath.PathLike
    classes: Classes | None = None


def check_given(config: build.Config, initial: Initial | None) -> None:
    """Raises ConfigError for a model that cannot start from nothing."""
    if initial is None and family.is_drafter(config):
        raise build.ConfigError("a drafter learns to guess what a trained model draws: give --init")


def start(
    initial: Initial,
    config: build.Config,
    fresh: types.Params,
    mesh: Mesh,
    class_names: tuple[str, ...] | None,
) -> tuple[types.Params, types.Tokenizer | None]:
    """The averaged parameters of `initial` in the shapes and places of fresh ones, and a tokenizer.

    Classes are rows of one table, with a last row for none, which is kept. Positions of another
    grid are interpolated (bicubic, along rows and columns). The tokenizer is that of the run, whose
    codes its weights speak of; None where it is not fitted, but read from weights.

    Windows that the source lacks stay fresh: a model with windows starts from a plain one.

    Raises:
      build.ConfigError: They are of another model or size, or of other classes.
    """
    saved = restoring.saved_config(initial.workdir)
    source = saved_lib.load(saved)
    new_classes = _new_classes(initial, config, source, saved_lib.class_names(saved), class_names)
    _check_same_model(initial, config, source)
    of_classes = _depending_on(source, "data.num_classes", source.data.num_classes + 1)
    of_grid = _depending_on(source, "data.image_size", 2 * source.data.image_size)
    ours, theirs = _shapes(config), _shapes(source)
    own = {x for x in tensorar.PARTS if _holds(ours, x) and not _holds(theirs, x)}
    taken = {name: shape for name, shape in ours.items() if name.split("/")[0] not in own}
    _check_shapes(initial, taken, theirs, of_classes | of_grid)
    held, tokenizer = _opened(initial, source, config, mesh)
    grids = build.grid(source), build.grid(config)

    def place(path: tuple, fresh: Array, held: Array) -> Array:
        name = _name(path)
        if new_classes and name in of_classes:
            held = _with_classes(held, fresh, source.data.num_classes, config.data.num_classes)
        if name in of_grid and grids[0] != grids[1]:
            held = interpolated(held, *grids, build.family_of(config).num_prefix)
        return jax.device_put(held, fresh.sharding)

    logging.info(
        "--init %s: weights taken over%s%s%s",
        initial.workdir,
        f", {config.data.num_classes} classes new" if new_classes and of_classes else "",
        ", positions interpolated" if of_grid and grids[0] != grids[1] else "",
        f", new: {', '.join(sorted(own))}" if own else "",
    )
    kept = {name: x for name, x in fresh.items() if name not in own}
    made = jax.tree_util.tree_map_with_path(place, kept, held)
    return {name: made.get(name, x) for name, x in fresh.items()}, tokenizer


def _opened(
    initial: Initial, source: build.Config, config: build.Config, mesh: Mesh
) -> tuple[types.Params, types.Tokenizer | None]:
    """The parameters, and the tokenizer if it was fitted, for images of the config's size."""
    if restoring.is_converted(initial.workdir):
        return restoring.params_of(initial.workdir, source, mesh), None
    trained = restoring.restore(initial.workdir)
    if not isinstance(trained.tokenizer, patches.Patches):
        return trained.params, None
    shape = build.image_shape(config)
    return trained.params, dataclasses.replace(trained.tokenizer, image_shape=shape)


def interpolated(
    table: Float[Array, "l d"],
    source: tuple[int, int],
    target: tuple[int, int],
    num_prefix: int | None,
) -> Float[Array, "m d"]:
    """A table of positions for another grid.

    Args:
      source, target: Rows and columns of the grids.
      num_prefix: Rows before the grid; None: all that are not the grid's.
    """
    count = source[0] * source[1]
    start = len(table) - count if num_prefix is None else num_prefix
    square = table[start : start + count].reshape(*source, -1)
    resized = jax.image.resize(square, (*target, square.shape[-1]), "cubic")
    middle = resized.reshape(-1, square.shape[-1])
    return jnp.concatenate([table[:start], middle, table[start + count :]])


def _with_classes(
    held: Float[Array, "l d"], fresh: Float[Array, "m d"], num_held: int, num_fresh: int
) -> Float[Array, "m d"]:
    """Fresh rows for the classes; what stands before them, and the row of no class, is kept."""
    before = len(held) - num_held - 1
    return jnp.concatenate([held[:before], fresh[before : before + num_fresh], held[-1:]])


def _new_classes(
    initial: Initial,
    config: build.Config,
    source: build.Config,
    theirs: tuple[str, ...] | None,
    ours: tuple[str, ...] | None,
) -> bool:
    """Whether the table of classes is fresh."""
    held, wanted = source.data.num_classes, config.data.num_classes
    if initial.classes == "new":
        return True
    if held != wanted:
        raise build.ConfigError(
            f"--init {initial.workdir} has {held} classes, the config {wanted}: give "
            "--init_classes new for a fresh table of classes"
        )
    if initial.classes is None and theirs is not None and ours is not None and theirs != ours:
        first = next(i for i, name in enumerate(ours) if name != theirs[i])
        raise build.ConfigError(
            f"--init {initial.workdir} has other classes (number {first} is {theirs[first]!r} "
            f"there, {ours[first]!r} here): give --init_classes new for a fresh table, or keep"
        )
    return False


def _check_same_model(initial: Initial, config: build.Config, source: build.Config) -> None:
    for section in ("model", "tokenizer"):
        held, wanted = source[section]["name"], config[section]["name"]
        if held != wanted:
            raise build.ConfigError(
                f"--init {initial.workdir} has {section} {held}, the config {wanted}: weights "
                "serve the same model and tokenizer only"
            )


def _check_shapes(
    initial: Initial,
    ours: dict[str, tuple[int, ...]],
    theirs: dict[str, tuple[int, ...]],
    adapted: set[str],
) -> None:
    """Raises ConfigError for the first array that differs and cannot be adapted."""
    for part in tensorar.PARTS:
        if _holds(theirs, part) and not _holds(ours, part):
            raise build.ConfigError(
                f"--init {initial.workdir} has a {part}, the config none: take the section "
                "tensorar of those weights"
            )
    for name in ours | theirs:
        here, there = ours.get(name, "absent"), theirs.get(name, "absent")
        if here != there and not (name in adapted and name in ours and name in theirs):
            raise build.ConfigError(
                f"--init {initial.workdir}: {name} is {there} there, {here} here: take the config "
                "of those weights, with data and training of your own"
            )


def _holds(shapes: dict[str, tuple[int, ...]], part: str) -> bool:
    return any(name.split("/")[0] == part for name in shapes)


def _shapes(config: build.Config) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(nn.unbox(build.abstract_params(config)))
    return {_name(path): tuple(leaf.shape) for path, leaf in leaves}


def _depending_on(config: build.Config, key: str, other: Any) -> set[str]:
    """Arrays whose shape another value of a setting would change."""
    section, leaf = key.split(".")
    changed = config.copy_and_resolve_references()
    changed[section][leaf] = other
    shapes, others = _shapes(config), _shapes(changed)
    return {name for name in shapes if shapes[name] != others.get(name)}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
