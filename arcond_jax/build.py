"""From a config to objects; the only place that knows what a config looks like.

Every function takes the whole config and returns a plain object or a pure function, so a
researcher can take one part and leave the rest.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from arcond_jax import checkpoint, sharding, types
from arcond_jax import config as config_lib
from arcond_jax.data import digits, folder, pipeline
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.diffusion import solvers
from arcond_jax.models import diffusion_head, dit, gpt, joint, mar
from arcond_jax.nn import stack
from arcond_jax.sampling import causal, stride
from arcond_jax.sampling import grid as grid_lib
from arcond_jax.sampling import mar as mar_sampling
from arcond_jax.tokenizers import kl, patches
from arcond_jax.training import optimizer as optimizer_lib
from arcond_jax.training import state as state_lib
from arcond_jax.training import step as step_lib
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import options as options_lib

Config = config_lib.Config
ConfigError = config_lib.ConfigError

WEIGHTS = "weights"  # within a folder of converted weights
BACKBONES = ("gpt", "mar", "dit")
SOURCES = ("digits", "folder")
TOKENIZERS = ("patches", "kl")
REFINEMENTS = ("none", "stored", "bures", "in_batch")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Reads `path[:variant]` and applies overrides of the form `section.key=value`.

    Raises:
      ConfigError: no such file or variant, an unknown key, or a value that cannot be used.
    """
    return with_overrides(config_lib.read(path), overrides)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Applies `section.key=value` strings in place and checks the result.

    Raises:
      ConfigError: an unknown key, a value of the wrong type, or one no part could work with.
    """
    for override in overrides:
        config_lib.override(config, override)
    check(config)
    return config


def check(config: Config) -> None:
    """Raises ConfigError for values that no part could work with, naming the key."""
    _check_choice("backbone", config.backbone, BACKBONES)
    _check_choice("data.name", config.data.name, SOURCES)
    _check_choice("tokenizer.name", config.tokenizer.name, TOKENIZERS)
    _check_choice("training.dtype", config.training.dtype, DTYPES)
    _check_choice("transport.kind", config.transport.kind, REFINEMENTS)
    _check_choice("transport.grouping", config.transport.grouping, ("class", "shared"))
    for backbone in BACKBONES:
        _check_choice(f"{backbone}.remat", config[backbone].remat, stack.REMAT)
    sizes = ("depth", "width", "num_heads")
    positive = {
        "data": ("batch_size", "image_size", "num_channels", "num_classes"),
        "tokenizer": ("patch_size", "num_codes"),
        "kl": ("width", "num_blocks", "latent_channels"),
        "gpt": (*sizes, "unroll"),
        "mar": (
            *(f"{part}_{name}" for part in ("encoder", "decoder") for name in sizes),
            "buffer_size",
            "unroll",
        ),
        "dit": (*sizes, "unroll"),
        "diffusion_head": ("depth", "width"),
        "loss": ("num_copies",),
        "training": ("num_accumulations", "log_every", "checkpoint_every", "checkpoints_kept"),
        "sampling": ("num_head_evaluations", "stride"),
        "transport": ("num_atoms", "num_sources"),
    }
    values = config_lib.flat(config)
    for key in (f"{section}.{name}" for section, names in positive.items() for name in names):
        if values[key] < 1:
            raise ConfigError(f"{key} {values[key]} must be at least 1")
    length = int(np.prod(grid(config)))
    if not 1 <= config.tensorar.window <= length:
        raise ConfigError(
            f"tensorar.window {config.tensorar.window} must be from 1 to the {length} positions of "
            "the token grid"
        )
    for section, part in (("gpt", ""), ("mar", "encoder_"), ("mar", "decoder_"), ("dit", "")):
        width, heads = (values[f"{section}.{part}{name}"] for name in ("width", "num_heads"))
        if width % heads:
            raise ConfigError(
                f"{section}.{part}width {width} is not divisible by {section}.{part}num_heads "
                f"{heads}"
            )
    weights = (config.loss.w_diffusion, config.loss.w_tensor)
    if min(weights) < 0 or max(weights) == 0:
        raise ConfigError(
            f"loss.w_diffusion {weights[0]} and loss.w_tensor {weights[1]} must not be negative, "
            "and not both 0"
        )
    if weights[1] and (config.backbone != "gpt" or config.tokenizer.name == "kl"):
        raise ConfigError(
            f"loss.w_tensor {weights[1]} needs codes, which backbone {config.backbone} on "
            f"tokenizer {config.tokenizer.name} has not: set it to 0"
        )
    if config.backbone == "dit" and config.transport.kind != "none":
        raise ConfigError(
            f"transport.kind {config.transport.kind} needs a condition per token, and backbone dit "
            "has one for all: set it to none"
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
    """Random access to a split ("train" or "held_out") of the config's dataset.

    Raises:
      ConfigError: There is no such dataset, or it is not what the config says.
    """
    data = config.data
    if data.name == "digits":
        made = digits.Digits(split)
    elif data.directory is None:
        raise ConfigError("data.directory is not set: give the folder that holds the images")
    else:
        made = folder.ImageFolder(data.directory, split, image_size=data.image_size)
    found = dict(num_classes=made.num_classes, image_shape=tuple(made.image_shape))
    wanted = dict(num_classes=data.num_classes, image_shape=image_shape(config))
    for name, value in wanted.items():
        if found[name] != value:
            raise ConfigError(
                f"the {split} split of {data.name} has {name} {found[name]}, the data section of "
                f"the config says {value}"
            )
    return made


def image_shape(config: Config) -> tuple[int, int, int]:
    """Height, width and channels of the images."""
    return config.data.image_size, config.data.image_size, config.data.num_channels


def grid(config: Config) -> tuple[int, int]:
    """Rows and columns of tokens.

    Raises:
      ConfigError: Images of this size cannot be cut into tokens.
    """
    edge = config.tokenizer.patch_size
    if config.tokenizer.name == "kl":
        edge *= kl_network(config).design.stride
    side = config.data.image_size
    if side % edge:
        raise ConfigError(f"data.image_size {side} is not divisible by {edge}, the edge of a token")
    return side // edge, side // edge


def token_channels(config: Config) -> int:
    """Numbers in a latent."""
    channels = config.data.num_channels
    if config.tokenizer.name == "kl":
        channels = config.kl.latent_channels
    return channels * config.tokenizer.patch_size**2


def kl_network(config: Config) -> kl.KLAutoencoder:
    """The autoencoder of the tokenizer "kl"; attention at the lowest resolution, as in KL-16."""
    section = config.kl
    return kl.KLAutoencoder(
        width=section.width,
        multipliers=tuple(section.multipliers),
        num_blocks=section.num_blocks,
        latent_channels=section.latent_channels,
        attention_levels=(len(section.multipliers) - 1,),
        dtype=DTYPES[config.training.dtype],
    )


def tokenizer(config: Config) -> types.Tokenizer:
    """The tokenizer: "patches" is fitted to the training split, "kl" read from its weights.

    Raises:
      ConfigError: No weights are named.
      checkpoint.CheckpointError: They cannot be read, or are of another model.
    """
    if config.tokenizer.name == "kl":
        if config.tokenizer.path is None:
            raise ConfigError(
                "tokenizer.path is not set: give the folder that `arcond convert --family kl16` "
                "made"
            )
        abstract = abstract_kl(config)
        params = load_weights(config.tokenizer.path, abstract.params)
        return dataclasses.replace(abstract, params=params)
    split = source(config, "train")
    return patches.fit(
        np.stack([split[i]["image"] for i in range(len(split))]),
        patch_size=config.tokenizer.patch_size,
        num_codes=config.tokenizer.num_codes,
        seed=config.seed,
    )


def abstract_tokenizer(config: Config) -> patches.Patches | kl.KL:
    """Shapes of the tokenizer, to restore a fitted one into."""
    if config.tokenizer.name == "kl":
        return abstract_kl(config)
    return patches.abstract(
        image_shape(config),
        patch_size=config.tokenizer.patch_size,
        num_codes=config.tokenizer.num_codes,
    )


def abstract_kl(config: Config) -> kl.KL:
    """Shapes of the tokenizer "kl"."""
    return kl.abstract(
        kl_network(config),
        image_size=image_shape(config)[:2],
        latent_scale=config.kl.latent_scale,
        patch_size=config.tokenizer.patch_size,
    )


def head(config: Config) -> diffusion_head.DiffusionHead:
    """The denoising MLP."""
    return diffusion_head.DiffusionHead(
        channels=token_channels(config),
        depth=config.diffusion_head.depth,
        width=config.diffusion_head.width,
        dtype=DTYPES[config.training.dtype],
    )


def network(config: Config) -> joint.Joint | mar.MAR | dit.DiT:
    """The Linen module; a loss weight of 0 leaves out what only that loss needs."""
    place = dict(grid=grid(config), dtype=DTYPES[config.training.dtype])
    num_classes = config.data.num_classes
    if config.backbone == "mar":
        return mar_network(config)
    if config.backbone == "dit":
        channels = token_channels(config)
        return dit.DiT(num_classes=num_classes, channels=channels, **place, **config.dit)
    has_codes = config.loss.w_tensor > 0
    return joint.Joint(
        backbone=gpt.GPT(**place, **config.gpt),
        num_classes=num_classes,
        head=head(config) if config.loss.w_diffusion > 0 else None,
        num_codes=config.tokenizer.num_codes if has_codes else None,
        window=config.tensorar.window if has_codes else 1,
        window_depth=config.tensorar.depth,
        window_mlp_ratio=config.tensorar.mlp_ratio,
    )


def mar_network(config: Config) -> mar.MAR:
    """The Linen module of backbone "mar"."""
    sizes = {name: value for name, value in config.mar.items() if name != "mask_rate_min"}
    return mar.MAR(
        grid=grid(config),
        num_classes=config.data.num_classes,
        head=head(config),
        dtype=DTYPES[config.training.dtype],
        **sizes,
    )


def generator(
    config: Config, fitted: types.Tokenizer | None = None
) -> joint.Generator | mar.Generator | dit.Generator:
    """Initialisation and losses. Noise "codebook" needs the fitted tokenizer."""
    model, schedule, loss = network(config), schedule_lib.Schedule.cosine(), config.loss
    if isinstance(model, dit.DiT):
        return dit.Generator(model, schedule, label_dropout=loss.label_dropout)
    if isinstance(model, mar.MAR):
        ends = mar_sampling.step_ends(model.length, config.sampling.num_ar_steps)
        return mar.Generator(
            model,
            schedule,
            slot_starts=(0, *ends[:-1].tolist()),
            label_dropout=loss.label_dropout,
            num_copies=loss.num_copies,
            mask_rate_min=config.mar.mask_rate_min,
        )
    codebook = None
    if isinstance(fitted, patches.Patches):
        # Raw pixels share a direction, brightness, that would hide all others in a cosine.
        codebook = np.asarray(fitted.codebook - fitted.codebook.mean(axis=0))
    return joint.Generator(
        network=model,
        schedule=schedule,
        drafts=config.tensorar.drafts,
        noise=config.tensorar.noise,
        noise_schedule=config.tensorar.noise_schedule,
        nested=config.tensorar.nested,
        codebook=codebook,
        **loss,
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
        spared=() if training.decay_head else ("denoiser",),
    )
    return update, rate


def empty_bank(config: Config) -> bank_lib.Bank | None:
    """A bank with a slot per position (MAR: per decoding step), and a group per class or for all.

    None without refinement.
    """
    if config.transport.kind == "none":
        return None
    shared = config.transport.grouping == "shared"
    is_mar = config.backbone == "mar"
    return bank_lib.init_bank(
        config.sampling.num_ar_steps if is_mar else int(np.prod(grid(config))),
        1 if shared else config.data.num_classes,
        num_atoms=config.transport.num_atoms,
        width=config.mar.decoder_width if is_mar else config.gpt.width,
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
    config: Config, on: Mesh, fitted: types.Tokenizer | None = None
) -> Callable[..., tuple[state_lib.TrainState, dict]]:
    """The compiled update `(state, tokenizer, batch) -> (state, metrics)`; the state is donated."""
    update, rate = optimizer(config)
    step = step_lib.make_train_step(
        generator(config, fitted),
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


def solver(config: Config) -> solvers.Solver:
    """The chain of the diffusion head."""
    sampling, process = config.sampling, schedule_lib.Schedule.cosine()
    timesteps = schedule_lib.spaced_timesteps(
        process,
        sampling.num_head_evaluations,
        spacing=sampling.spacing,
        start=1.0 if sampling.warm_start is None else sampling.warm_start,
    )
    return solvers.Solver(
        process.respace(timesteps),
        kind=sampling.solver,
        temperature=sampling.latent_temperature,
        clip=sampling.clip_latents,
    )


def sampler(
    config: Config, *, trace: bool = False, num_known: int = 0
) -> causal.CausalSampler | stride.StrideSampler | mar_sampling.MARSampler | grid_lib.GridSampler:
    """The sampling loop `(params, rng, label, *, refiner, ...) -> Sampled`, not yet compiled.

    Args:
      num_known: Tokens that are given; only MAR can keep any.

    Raises:
      ConfigError: Tokens are given to a backbone that draws all of them.
    """
    sampling, model = config.sampling, network(config)
    guidance = dict(guidance_scale=sampling.guidance_scale)
    if num_known and not isinstance(model, mar.MAR):
        raise ConfigError(f"backbone {config.backbone} draws every token: only mar can keep some")
    if isinstance(model, dit.DiT):
        return grid_lib.GridSampler(model, solver(config), trace=trace, **guidance)
    guidance |= dict(guidance_schedule=sampling.guidance_schedule)
    if isinstance(model, mar.MAR):
        return mar_sampling.MARSampler(
            model,
            solver(config),
            num_ar_steps=sampling.num_ar_steps,
            num_buckets=sampling.num_buckets,
            num_known=num_known,
            trace=trace,
            **guidance,
        )
    loop = causal.CausalSampler(
        model,
        None if model.head is None else solver(config),
        warm=sampling.warm_start is not None,
        code_temperature=sampling.code_temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        drafts=sampling.drafts,
        trace=trace,
        **guidance,
    )
    return loop if sampling.stride == 1 else stride.StrideSampler(loop, sampling.stride)


def load_weights(directory: str, abstract: types.Params) -> types.Params:
    """Parameters that `arcond convert` wrote, on every device.

    Raises:
      checkpoint.CheckpointError: None there, damaged, or of another model.
    """
    return checkpoint.load_tree(f"{directory}/{WEIGHTS}", {"params": abstract})["params"]
