"""Everything a run needs to continue: parameters, their average, optimizer, counters."""

import dataclasses
from typing import Any, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key, UInt32

from arcond_jax import types
from arcond_jax.parallel import compiled
from arcond_jax.parallel import mesh as mesh_lib


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class TrainState:
    """One tree, saved and restored as a whole.

    Attributes:
      step: Updates tried so far, skipped ones included.
      ema: Exponential average of `params`, float32; what is sampled and refined.
      rng: Raw bits of the run's key; a step folds its number in.
      skipped_in_a_row, skipped: Updates left out because the gradient was not finite.
    """

    step: Int[Array, ""]
    params: types.Params
    ema: types.Params
    opt_state: Any
    rng: UInt32[Array, "..."]
    skipped_in_a_row: Int[Array, ""]
    skipped: Int[Array, ""]


def create(
    generator: types.Generator,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    mesh: Mesh,
) -> TrainState:
    """A fresh state, every array born in its shards."""
    boxed = abstract(generator, optimizer, seed=seed)
    shardings = mesh_lib.tree_shardings(boxed, mesh)

    def init() -> TrainState:
        return nn.unbox(_init(generator, optimizer, jax.random.key(seed)))

    return compiled.Compiled(init, mesh, out_shardings=shardings)()


def abstract(
    generator: types.Generator,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
) -> TrainState:
    """Shapes and logical axes of the state, nothing computed."""
    return jax.eval_shape(lambda: _init(generator, optimizer, jax.random.key(seed)))


def abstract_on(boxed: Any, mesh: Mesh) -> Any:
    """Shapes of a state or a part of it, with their places on a mesh, ready to restore into."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.unbox(boxed),
        mesh_lib.tree_shardings(boxed, mesh),
    )


def with_params(state: TrainState, params: types.Params) -> TrainState:
    """A fresh state that starts from given parameters, and so does their average."""
    return dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params))


def _init(
    generator: types.Generator,
    optimizer: optax.GradientTransformation,
    rng: Key[Array, ""],
) -> TrainState:
    init_rng, run_rng = jax.random.split(rng)
    params = generator.init(init_rng)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(run_rng),
        skipped_in_a_row=zero,
        skipped=zero,
    )
