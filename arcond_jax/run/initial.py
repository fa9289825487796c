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
from arcond_jax.build import saved as saved_lib
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


def params(
    initial: Initial,
    config: build.Config,
    fresh: types.Params,
    mesh: Mesh,
    class_names: tuple[str, ...] | None,
) -> types.Params:
    """The averaged parameters of `initial` in the shapes and places of fresh ones.

    Classes are rows of one table, with a last row for none, which is kept. Positions of another
    grid are interpolated (bicubic, along rows and columns).

    Raises:
      build.ConfigError: They are of another model or size, or of other classes.
    """
    saved = restoring.saved_config(initial.workdir)
    source = saved_lib.load(saved)
    new_classes = _new_classes(initial, config, source, saved_lib.class_names(saved), class_names)
    _check_same_model(initial, config, source)
    ours, theirs = _shapes(config), _shapes(source)
    of_classes = _depending_on(source, "data.num_classes", source.data.num_classes + 1)
    of_grid = _depending_on(source, "data.image_size", 2 * source.data.image_size)
    for name in ours | theirs:
        adapted = name in of_classes or name in of_grid
        if (ours.get(name) is None) or (theirs.get(name) is None):
            adapted = False
        if ours.get(name) != theirs.get(name) and not adapted:
            raise build.ConfigError(
                f"--init {initial.workdir}: {name} is {theirs.get(name, 'absent')} there, "
                f"{ours.get(name, 'absent')} here: take the config of those weights, with data and "
                "training of your own"
            )
    held = restoring.params_of(initial.workdir, source, mesh)

    def start(path: tuple, fresh: Array, held: Array) -> Array:
        name = _name(path)
        if new_classes and name in of_classes:
            held = _with_classes(held, fresh, source.data.num_classes, config.data.num_classes)
        if name in of_grid and build.grid(source) != build.grid(config):
            prefix = build.family_of(config).num_prefix
            held = interpolated(held, build.grid(source), build.grid(config), prefix)
        return jax.device_put(held, fresh.sharding)

    made = jax.tree_util.tree_map_with_path(start, fresh, held)
    said = [f"--init {initial.workdir}: {len(ours)} arrays taken over"]
    if new_classes and of_classes:
        said.append(f"{config.data.num_classes} classes new")
    if build.grid(source) != build.grid(config):
        said.append(f"positions interpolated to {'x'.join(map(str, build.grid(config)))}")
    logging.info("%s", ", ".join(said))
    return made


def tokenizer(initial: Initial, config: build.Config) -> types.Tokenizer | None:
    """The fitted tokenizer of the run that `initial` is, whose codes its weights speak of.

    None where the tokenizer is not fitted, but read from weights.
    """
    if restoring.is_converted(initial.workdir):
        return None
    fitted = restoring.restore(initial.workdir).tokenizer
    if not isinstance(fitted, patches.Patches):
        return None
    return dataclasses.replace(fitted, image_shape=build.image_shape(config))


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
