"""The mesh, the optimizer, the train state and the compiled update."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from arcond_jax import placement, types
from arcond_jax.build import family, models, tokens, transport
from arcond_jax.config import Config, ConfigError
from arcond_jax.models import tensorar
from arcond_jax.parallel import compiled
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.training import optimizer as optimizer_lib
from arcond_jax.training import state as state_lib
from arcond_jax.training import step as step_lib


def mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over the devices; None for all there are.

    Raises:
      ConfigError: too few devices for it, or a `tensor` axis that does not divide what it cuts.
    """
    try:
        made = mesh_lib.make_mesh(**config.mesh, devices=devices)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _check_tensor(config)
    return made


def _check_tensor(config: Config) -> None:
    """Raises ConfigError if heads, MLP or codes cannot be cut as many times as the mesh says."""
    tensor = config.mesh.tensor
    if tensor == 1:
        return
    boxed = jax.tree_util.tree_leaves_with_path(
        abstract_params(config), is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
    for path, leaf in boxed:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        for name, size in zip(leaf.names, leaf.value.shape, strict=True):
            cut = placement.RULES.get(name) == placement.TENSOR
            # A table may have any number of rows: then it is whole.
            if cut and size % tensor and "table" not in where:
                raise ConfigError(
                    f"mesh.tensor {tensor} does not divide {size}, the {name} of "
                    f"{where.removesuffix('/value')}: take a divisor, or mesh.fsdp in its place"
                )


def training_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The same, for training: what else a run does takes batches of any size.

    Raises:
      ConfigError: too few devices for it, or a batch that cannot be spread over it.
    """
    made, size = mesh(config, devices), config.data.batch_size
    shards = mesh_lib.num_batch_shards(made) * config.training.num_accumulations
    if size % shards:
        nearest = max(1, round(size / shards)) * shards
        raise ConfigError(
            f"data.batch_size {size} is not divisible by {shards}, the batch shards of the mesh "
            f"times training.num_accumulations: the nearest that is, is {nearest}"
        )
    return made


def optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its learning-rate curve."""
    training = config.training
    rate = optimizer_lib.learning_rate(
        training.learning_rate,
        num_train_steps=training.num_train_steps,
        num_warmup_steps=training.num_warmup_steps,
        decay=training.decay,
        decay_to=training.decay_to,
    )
    update = optimizer_lib.adamw(
        rate,
        b1=training.b1,
        b2=training.b2,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
        spared=() if training.get("decay_head", True) else ("denoiser",),
        own=tensorar.PARTS,
        base_rate=family.base_rate(config),
    )
    return update, rate


def empty_bank(config: Config) -> Any:
    """A bank with a slot per condition of a row, and a group per class or for all.

    None without refinement.

    Raises:
      ConfigError: It would not fit a device.
    """
    return transport.empty_bank(config, models.conditions(config))


def abstract_params(config: Config) -> types.Params:
    """Shapes and axis names of the parameters."""
    return jax.eval_shape(models.generator(config).init, jax.random.key(0))


def abstract_state(config: Config) -> state_lib.TrainState:
    """Shapes and axis names of the train state."""
    update, _ = optimizer(config)
    return state_lib.abstract(models.generator(config), update)


def train_state(config: Config, on: Mesh) -> state_lib.TrainState:
    """A fresh train state, born in its shards."""
    update, _ = optimizer(config)
    return state_lib.create(
        models.generator(config),
        update,
        seed=config.seed,
        mesh=on,
    )


def train_step(
    config: Config, on: Mesh, fitted: types.Tokenizer | None = None
) -> compiled.Compiled:
    """The compiled update `(state, tokenizer, batch) -> (state, metrics)`; the state is donated."""
    update, rate = optimizer(config)
    step = functools.partial(
        step_lib.train_step,
        generator=models.generator(config, fitted),
        tokens_of=tokens.tokens_of,
        optimizer=update,
        rate=rate,
        ema_decay=config.training.ema_decay,
        num_accumulations=config.training.num_accumulations,
    )
    places = mesh_lib.tree_shardings(abstract_state(config), on)
    whole, batch = mesh_lib.replicated(on), mesh_lib.batch_sharding(on)
    return compiled.Compiled(
        step,
        on,
        in_shardings=(places, whole, batch),
        out_shardings=(places, whole),
        donate_argnums=0,
    )


def window_metrics(
    config: Config, on: Mesh, fitted: types.Tokenizer | None = None
) -> compiled.Compiled | None:
    """The compiled `(state, tokenizer, batch) -> metrics` of windows; None where there are none."""
    if not family.has_windows(config):
        return None
    measures = functools.partial(
        step_lib.measures,
        metrics=models.generator(config, fitted).window_metrics,
        tokens_of=tokens.tokens_of,
        num_accumulations=config.training.num_accumulations,
    )
    places = mesh_lib.tree_shardings(abstract_state(config), on)
    whole, batch = mesh_lib.replicated(on), mesh_lib.batch_sharding(on)
    return compiled.Compiled(measures, on, in_shardings=(places, whole, batch), out_shardings=whole)
