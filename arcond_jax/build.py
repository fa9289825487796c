"""From a config to objects; the only place that knows what a config looks like.

Every function takes the whole config and returns a plain object or a pure function, so a
researcher can take one part and leave the rest.
"""

import ast
import difflib
import pathlib
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import config_dict

from arcond_jax import sharding
from arcond_jax.data import digits, pipeline
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.diffusion import solvers
from arcond_jax.models import diffusion_head, gpt, joint
from arcond_jax.sampling import causal, stride
from arcond_jax.tokenizers import patches
from arcond_jax.training import optimizer as optimizer_lib
from arcond_jax.training import state as state_lib
from arcond_jax.training import step as step_lib
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import options as options_lib

Config = ml_collections.ConfigDict

SOURCES = {"digits": digits.Digits}
REFINEMENTS = ("none", "stored", "bures", "in_batch")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class ConfigError(ValueError):
    """A config that cannot be used: which key, why, and what would do."""


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Reads `path[:variant]` and applies overrides of the form `section.key=value`.

    A path that does not exist is looked for among the configs that come with the library.

    Raises:
      ConfigError: no such file or variant, an unknown key, or a value of the wrong type.
    """
    path, _, variant = path.partition(":")
    try:
        config = _run_config_file(_find_config_file(path), variant)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # a config file is a program of the user's
        raise ConfigError(f"{path} fails with {type(error).__name__}: {error}") from None
    return with_overrides(config, overrides)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Applies `section.key=value` strings in place and checks the result.

    Raises:
      ConfigError: an unknown key, a value of the wrong type, or one no part could work with.
    """
    for override in overrides:
        _override(config, override)
    check(config)
    return config


def _run_config_file(path: pathlib.Path, variant: str) -> Config:
    root = str(path.parent.parent)
    sys.path.insert(0, root)  # config files import each other as `configs.<name>`
    try:
        get_config = runpy.run_path(str(path))["get_config"]
        return get_config(variant) if variant else get_config()
    finally:
        sys.path.remove(root)


def _find_config_file(path: str) -> pathlib.Path:
    package = pathlib.Path(__file__).parent
    name = path if path.endswith(".py") else f"{path}.py"
    shipped = [place / "configs" / pathlib.Path(name).name for place in (package.parent, package)]
    for candidate in [pathlib.Path(name), *shipped]:
        if candidate.is_file():
            return candidate.resolve()
    there = sorted(p.stem for place in shipped for p in place.parent.glob("*.py"))
    raise ConfigError(f"no config file {path}: the library comes with {', '.join(there)}")


def _override(config: Config, override: str) -> None:
    name, _, text = override.partition("=")
    *sections, leaf = name.split(".")
    section = config
    for part in sections:
        section = section.get(part) if isinstance(section, Config) else None
    if not isinstance(section, Config) or leaf not in section:
        known = list(flat(config))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(config)}"
        raise ConfigError(f"unknown config key {name}: {hint}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text  # a bare word is a string
    expected = section.get_type(leaf)
    if expected is float and type(value) is int:
        value = float(value)
    # Placeholders, and only they, may be None.
    fields = dict(section.items(preserve_field_references=True))
    optional = isinstance(fields[leaf], config_dict.FieldReference)
    if type(value) is not expected and not (value is None and optional):
        wanted = expected.__name__ + (" or None" if optional else "")
        raise ConfigError(f"config key {name} wants {wanted}, not {text!r}")
    section[leaf] = value


def config_from_dict(saved: Mapping[str, Any]) -> Config:
    """The config of `to_dict`, as a checkpoint holds it.

    Raises:
      ConfigError: It has keys this version does not know, or lacks some.
    """
    config = _run_config_file(_find_config_file("base"), "")
    values = flat(Config(saved))
    unknown = sorted(values.keys() ^ flat(config).keys())
    if unknown:
        raise ConfigError(f"the saved config is of another version: it differs in {unknown[0]}")
    config.update_from_flattened_dict(values)
    return config


def flat(config: Config) -> dict[str, Any]:
    """All keys as `section.key`."""
    values = {}
    for name, value in config.items():
        if isinstance(value, Config):
            values |= {f"{name}.{inner}": x for inner, x in flat(value).items()}
        else:
            values[name] = value
    return values


def check(config: Config) -> None:
    """Raises ConfigError for values that no part could work with, naming the key."""
    _check_choice("data.name", config.data.name, SOURCES)
    _check_choice("tokenizer.name", config.tokenizer.name, ("patches",))
    _check_choice("training.dtype", config.training.dtype, DTYPES)
    _check_choice("transport.kind", config.transport.kind, REFINEMENTS)
    _check_choice("transport.grouping", config.transport.grouping, ("class", "shared"))
    _check_choice("gpt.remat", config.gpt.remat, ("none", *gpt.REMAT_POLICIES))
    positive = {
        "data": ("batch_size",),
        "tokenizer": ("patch_size", "num_codes"),
        "gpt": ("depth", "width", "num_heads", "unroll"),
        "diffusion_head": ("depth", "width"),
        "loss": ("num_copies",),
        "training": ("num_accumulations", "log_every", "checkpoint_every", "checkpoints_kept"),
        "sampling": ("num_head_evaluations", "stride"),
        "transport": ("num_atoms", "num_sources"),
    }
    values = flat(config)
    for key in (f"{section}.{name}" for section, names in positive.items() for name in names):
        if values[key] < 1:
            raise ConfigError(f"{key} {values[key]} must be at least 1")
    length = int(np.prod(grid(config)))
    if not 1 <= config.tensorar.window <= length:
        raise ConfigError(
            f"tensorar.window {config.tensorar.window} must be from 1 to the {length} positions of "
            "the token grid"
        )
    if config.gpt.width % config.gpt.num_heads:
        raise ConfigError(
            f"gpt.width {config.gpt.width} is not divisible by gpt.num_heads {config.gpt.num_heads}"
        )
    weights = (config.loss.w_diffusion, config.loss.w_tensor)
    if min(weights) < 0 or max(weights) == 0:
        raise ConfigError(
            f"loss.w_diffusion {weights[0]} and loss.w_tensor {weights[1]} must not be negative, "
            "and not both 0"
        )
    if config.data.batch_size % config.training.num_accumulations:
        raise ConfigError(
            f"training.num_accumulations {config.training.num_accumulations} does not divide "
            f"data.batch_size {config.data.batch_size}"
        )
    # Building costs nothing and runs the checks of the parts themselves.
    try:
        optimizer(config)
        refine_options(config)
        sampler(config)
        if config.tensorar.noise != "codebook":
            generator(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_choice(key: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} {value!r} is not one of {', '.join(allowed)}")


def source(config: Config, split: str) -> pipeline.Source:
    """Random access to a split ("train" or "held_out") of the config's dataset."""
    return SOURCES[config.data.name](split)


def grid(config: Config) -> tuple[int, int]:
    """Rows and columns of tokens."""
    height, width, _ = SOURCES[config.data.name].image_shape
    return height // config.tokenizer.patch_size, width // config.tokenizer.patch_size


def tokenizer(config: Config) -> patches.Patches:
    """The tokenizer, fitted to the training split."""
    split = source(config, "train")
    return patches.fit(
        np.stack([split[i]["image"] for i in range(len(split))]),
        patch_size=config.tokenizer.patch_size,
        num_codes=config.tokenizer.num_codes,
        seed=config.seed,
    )


def abstract_tokenizer(config: Config) -> patches.Patches:
    """Shapes of the tokenizer, to restore a fitted one into."""
    return patches.abstract(
        SOURCES[config.data.name].image_shape,
        patch_size=config.tokenizer.patch_size,
        num_codes=config.tokenizer.num_codes,
    )


def network(config: Config) -> joint.Joint:
    """The Linen module; a loss weight of 0 leaves out what only that loss needs."""
    dtype = DTYPES[config.training.dtype]
    dataset = SOURCES[config.data.name]
    head = None
    if config.loss.w_diffusion > 0:
        head = diffusion_head.DiffusionHead(
            channels=config.tokenizer.patch_size**2 * dataset.image_shape[2],
            depth=config.diffusion_head.depth,
            width=config.diffusion_head.width,
            dtype=dtype,
        )
    has_codes = config.loss.w_tensor > 0
    return joint.Joint(
        backbone=gpt.GPT(grid=grid(config), dtype=dtype, **config.gpt),
        num_classes=dataset.num_classes,
        head=head,
        num_codes=config.tokenizer.num_codes if has_codes else None,
        window=config.tensorar.window if has_codes else 1,
        window_depth=config.tensorar.depth,
        window_mlp_ratio=config.tensorar.mlp_ratio,
    )


def generator(config: Config, fitted: patches.Patches | None = None) -> joint.Generator:
    """Initialisation and losses. Noise "codebook" needs the fitted tokenizer."""
    codebook = None
    if fitted is not None:
        # Raw pixels share a direction, brightness, that would hide all others in a cosine.
        codebook = np.asarray(fitted.codebook - fitted.codebook.mean(axis=0))
    return joint.Generator(
        network=network(config),
        schedule=schedule_lib.Schedule.cosine(),
        drafts=config.tensorar.drafts,
        noise=config.tensorar.noise,
        noise_schedule=config.tensorar.noise_schedule,
        nested=config.tensorar.nested,
        codebook=codebook,
        **config.loss,
    )


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
    )
    update = optimizer_lib.adamw(
        rate,
        b1=training.b1,
        b2=training.b2,
        weight_decay=training.weight_decay,
        clip_norm=training.clip_norm,
    )
    return update, rate


def empty_bank(config: Config) -> bank_lib.Bank:
    """A bank with a slot per position and a group per class (or one for all)."""
    shared = config.transport.grouping == "shared"
    return bank_lib.init_bank(
        int(np.prod(grid(config))),
        1 if shared else SOURCES[config.data.name].num_classes,
        num_atoms=config.transport.num_atoms,
        width=config.gpt.width,
    )


def abstract_state(config: Config) -> state_lib.TrainState:
    """Shapes and axis names of the train state."""
    update, _ = optimizer(config)
    return state_lib.abstract(
        generator(_without_codebook(config)), update, lambda: empty_bank(config)
    )


def train_state(config: Config, on: Mesh) -> state_lib.TrainState:
    """A fresh train state, born in its shards."""
    update, _ = optimizer(config)
    return state_lib.create(
        generator(_without_codebook(config)),
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
    config: Config, on: Mesh, fitted: patches.Patches | None = None
) -> Callable[..., tuple[state_lib.TrainState, dict]]:
    """The compiled update `(state, tokenizer, batch) -> (state, metrics)`; the state is donated."""
    update, rate = optimizer(config)
    step = step_lib.make_train_step(
        generator(config, fitted),
        update,
        rate,
        ema_decay=config.training.ema_decay,
        num_accumulations=config.training.num_accumulations,
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


def sampler(config: Config, *, trace: bool = False) -> causal.CausalSampler | stride.StrideSampler:
    """The sampling loop `(params, rng, label, *, refiner, ...) -> Sampled`, not yet compiled."""
    sampling = config.sampling
    model = network(config)
    solver = None
    if model.head is not None:
        process = schedule_lib.Schedule.cosine()
        timesteps = schedule_lib.trailing_timesteps(
            len(process.betas),
            sampling.num_head_evaluations,
            start=1.0 if sampling.warm_start is None else sampling.warm_start,
        )
        solver = solvers.Solver(
            process.respace(timesteps),
            kind=sampling.solver,
            temperature=sampling.latent_temperature,
            clip=sampling.clip_latents,
        )
    loop = causal.CausalSampler(
        model,
        solver,
        warm=sampling.warm_start is not None,
        guidance_scale=sampling.guidance_scale,
        guidance_schedule=sampling.guidance_schedule,
        code_temperature=sampling.code_temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        drafts=sampling.drafts,
        trace=trace,
    )
    return loop if sampling.stride == 1 else stride.StrideSampler(loop, sampling.stride)
