"""The mesh, the optimizer, the train state and the compiled update."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from arcond_jax import sharding, types
from arcond_jax.build import models, tokens
from arcond_jax.config import Config, ConfigError
from arcond_jax.models import captioned
from arcond_jax.training import optimizer as optimizer_lib
from arcond_jax.training import state as state_lib
from arcond_jax.training import step as step_lib
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import options as options_lib
from arcond_jax.transport import residual

# Where the width of a condition that can be refined is said.
WIDTHS = {
    "gpt": "gpt.width",
    "magvit2": "gpt.width",
    "rar": "rar.width",
    "mar": "mar.decoder_width",
}

MAX_BANK_BYTES = 2**35  # the bank is whole on every device


def mesh(config: Config) -> Mesh:
    """The mesh over all devices.

    Raises:
      ConfigError: too few devices for it, or a batch that cannot be spread over it.
    """
    try:
        made = sharding.make_mesh(**config.mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    shards = sharding.num_batch_shards(made) * config.training.num_accumulations
    if config.data.batch_size % shards:
        raise ConfigError(
            f"data.batch_size {config.data.batch_size} is not divisible by {shards}, the batch "
            "shards of the mesh times training.num_accumulations"
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
        spared=() if training.decay_head else ("denoiser",),
    )
    return update, rate


def refine_options(config: Config) -> options_lib.RefineOptions:
    """Static choices of the refinement."""
    transport = config.transport
    return options_lib.RefineOptions(
        tau=transport.tau,
        num_jko_steps=transport.num_jko_steps,
        epsilon=transport.epsilon,
        debias=transport.debias,
        num_sinkhorn_iters=transport.num_sinkhorn_iters,
        max_move=transport.max_move,
        inverse_weight=transport.inverse_weight,
    )


def empty_bank(config: Config) -> bank_lib.Bank | residual.ResidualBank | None:
    """A bank with a slot per position (MAR: per decoding step), and a group per class or for all.

    None without refinement.

    Raises:
      ConfigError: It would not fit a device.
    """
    transport = config.transport
    if transport.kind == "none":
        return None
    num_slots, num_groups = int(np.prod(tokens.grid(config))), config.data.num_classes
    if config.backbone == "mar":
        num_slots = config.sampling.num_ar_steps
    if transport.grouping == "shared":
        num_groups = 1
    section, key = WIDTHS[config.backbone].split(".")
    sizes = dict(num_atoms=transport.num_atoms, width=config[section][key])
    if transport.kind == "residual":
        sizes["num_directions"] = min(transport.num_directions, sizes["width"])
        return residual.init_bank(num_slots, num_groups, **sizes)
    num_bytes = 4 * num_slots * num_groups * sizes["num_atoms"] * sizes["width"]
    if num_bytes > MAX_BANK_BYTES:
        raise ConfigError(
            f"transport.kind {transport.kind} would keep {num_bytes / 2**30:,.0f} GiB of "
            f"conditions, for {num_slots} slots and {num_groups} groups: use transport.kind="
            "residual, transport.grouping=shared or fewer transport.num_atoms"
        )
    return bank_lib.init_bank(num_slots, num_groups, **sizes)


def abstract_params(config: Config) -> types.Params:
    """Shapes and axis names of the parameters; captions are none of them."""
    model = models.network(config)
    if isinstance(model, captioned.Captioned):
        init = functools.partial(model.init, method=captioned.Captioned.touch_all)
        return jax.eval_shape(init, jax.random.key(0))["params"]
    return jax.eval_shape(models.generator(_without_codebook(config)).init, jax.random.key(0))


def abstract_state(config: Config) -> state_lib.TrainState:
    """Shapes and axis names of the train state."""
    update, _ = optimizer(config)
    return state_lib.abstract(
        models.generator(_without_codebook(config)), update, lambda: empty_bank(config)
    )


def train_state(config: Config, on: Mesh) -> state_lib.TrainState:
    """A fresh train state, born in its shards."""
    update, _ = optimizer(config)
    return state_lib.create(
        models.generator(_without_codebook(config)),
        update,
        lambda: empty_bank(config),
        seed=config.seed,
        mesh=on,
    )


def _without_codebook(config: Config) -> Config:
    """Noise does not matter for shapes and initial values, and its codebook may not exist yet."""
    config = config.copy_and_resolve_references()
    config.tensorar.noise = "none"
    return config


def train_step(
    config: Config, on: Mesh, fitted: types.Tokenizer | None = None
) -> Callable[..., tuple[state_lib.TrainState, dict]]:
    """The compiled update `(state, tokenizer, batch) -> (state, metrics)`; the state is donated."""
    update, rate = optimizer(config)
    step = step_lib.make_train_step(
        models.generator(config, fitted),
        update,
        rate,
        ema_decay=config.training.ema_decay,
        num_accumulations=config.training.num_accumulations,
        random_flip=config.data.random_flip,
    )
    places = sharding.tree_shardings(abstract_state(config), on)
    whole, batch = sharding.replicated(on), sharding.batch_sharding(on)
    return sharding.on_mesh(
        step,
        on,
        in_shardings=(places, whole, batch),
        out_shardings=(places, whole),
        donate_argnums=0,
    )
