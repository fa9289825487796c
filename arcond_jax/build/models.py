"""Networks, their losses and their samplers."""

import dataclasses

import numpy as np

from arcond_jax import types
from arcond_jax.build import tokens
from arcond_jax.config import Config, ConfigError
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.diffusion import solvers
from arcond_jax.models import captioned, diffusion_head, dit, gpt, joint, magvit2, mar, rar
from arcond_jax.sampling import causal, codes, stride
from arcond_jax.sampling import grid as grid_lib
from arcond_jax.sampling import mar as mar_sampling
from arcond_jax.tokenizers import patches

BACKBONES = ("gpt", "mar", "dit", "rar", "magvit2", "captioned")
GUIDANCE_OF_CODES = ("constant", "power_cosine")
Network = joint.Joint | mar.MAR | dit.DiT | rar.RAR | magvit2.MAGVIT2 | captioned.Captioned
Generator = joint.Generator | mar.Generator | dit.Generator | rar.Generator | magvit2.Generator
Sampler = (
    causal.CausalSampler
    | stride.StrideSampler
    | codes.CodeSampler
    | mar_sampling.MARSampler
    | grid_lib.GridSampler
)


def head(config: Config) -> diffusion_head.DiffusionHead:
    """The denoising MLP."""
    return diffusion_head.DiffusionHead(
        channels=tokens.token_channels(config),
        dtype=tokens.DTYPES[config.training.dtype],
        **config.diffusion_head,
    )


def network(config: Config) -> Network:
    """The Linen module; a loss weight of 0 leaves out what only that loss needs."""
    place = dict(grid=tokens.grid(config), dtype=tokens.DTYPES[config.training.dtype])
    num_classes = config.data.num_classes
    if config.backbone == "mar":
        sizes = {name: value for name, value in config.mar.items() if name != "mask_rate_min"}
        return mar.MAR(num_classes=num_classes, head=head(config), **place, **sizes)
    if config.backbone == "dit":
        channels = tokens.token_channels(config)
        return dit.DiT(num_classes=num_classes, channels=channels, **place, **config.dit)
    if config.backbone == "rar":
        sizes = {k: v for k, v in config.rar.items() if not k.startswith("shuffle")}
        num_codes = tokens.num_codes(config)
        return rar.RAR(num_codes=num_codes, num_classes=num_classes, **place, **sizes)
    if config.backbone == "captioned":
        prefix, width = config.captioned.num_prefix, config.captioned.caption_width
        backbone = gpt.GPT(**place, **config.gpt, num_prefix=prefix)
        return captioned.Captioned(backbone, num_classes, tokens.num_codes(config), width)
    backbone = gpt.GPT(**place, **config.gpt)
    if config.backbone == "magvit2":
        return magvit2.MAGVIT2(backbone, num_classes, **config.magvit2)
    has_codes = config.loss.w_tensor > 0
    return joint.Joint(
        backbone=backbone,
        num_classes=num_classes,
        head=head(config) if config.loss.w_diffusion > 0 else None,
        num_codes=tokens.num_codes(config) if has_codes else None,
        window=config.tensorar.window if has_codes else 1,
        window_depth=config.tensorar.depth,
        window_mlp_ratio=config.tensorar.mlp_ratio,
        token_dropout=config.loss.token_dropout,
    )


def generator(config: Config, fitted: types.Tokenizer | None = None) -> Generator:
    """Initialisation and losses. Noise "codebook" needs the fitted tokenizer.

    Raises:
      ConfigError: The backbone is sampled only.
    """
    check_trained(config)
    model, schedule, loss = network(config), schedule_lib.Schedule.cosine(), config.loss
    assert not isinstance(model, captioned.Captioned)  # refused above
    dropout = dict(label_dropout=loss.label_dropout)
    if isinstance(model, dit.DiT):
        return dit.Generator(model, schedule, **dropout)
    if isinstance(model, rar.RAR):
        shuffle = {k: v for k, v in config.rar.items() if k.startswith("shuffle")}
        return rar.Generator(model, **dropout, **shuffle)
    if isinstance(model, magvit2.MAGVIT2):
        return magvit2.Generator(model, **dropout)
    if isinstance(model, mar.MAR):
        ends = mar_sampling.step_ends(model.length, config.sampling.num_ar_steps)
        return mar.Generator(
            model,
            schedule,
            slot_starts=(0, *ends[:-1].tolist()),
            num_copies=loss.num_copies,
            mask_rate_min=config.mar.mask_rate_min,
            **dropout,
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
        **{name: value for name, value in loss.items() if name != "token_dropout"},
    )


def check_trained(config: Config) -> None:
    """Raises ConfigError for a backbone that has no training."""
    if config.backbone == "captioned":
        raise ConfigError(
            "backbone captioned has no training: convert official weights with `arcond convert`, "
            "and draw from them with `arcond sample --captions`"
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


def sampler(config: Config, *, trace: bool = False, num_known: int = 0) -> Sampler:
    """The sampling loop `(params, rng, label, *, refiner, ...) -> Sampled`, not yet compiled.

    Args:
      num_known: Tokens that are given; only MAR can keep any.

    Raises:
      ConfigError: Tokens are given to a backbone that draws all of them.
    """
    sampling, model = config.sampling, network(config)
    if num_known and not isinstance(model, mar.MAR):
        raise ConfigError(f"backbone {config.backbone} draws every token: only mar can keep some")
    if isinstance(model, rar.RAR | magvit2.MAGVIT2 | captioned.Captioned):
        return _code_sampler(config, model, trace=trace)
    guidance = dict(guidance_scale=sampling.guidance_scale)
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
        guided_positions=sampling.guided_positions,
        code_temperature=sampling.code_temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        drafts=sampling.drafts,
        trace=trace,
        **guidance,
    )
    return loop if sampling.stride == 1 else stride.StrideSampler(loop, sampling.stride)


def _code_sampler(config: Config, model: codes.CodeModel, *, trace: bool) -> codes.CodeSampler:
    sampling = config.sampling
    first = codes.Draw(
        guidance_scale=sampling.guidance_scale,
        temperature=sampling.code_temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )
    later = dict(
        guidance_scale=sampling.later_guidance_scale, temperature=sampling.later_code_temperature
    )
    later = dataclasses.replace(first, **{k: v for k, v in later.items() if v is not None})
    schedule, power = sampling.guidance_schedule, sampling.guidance_power
    if schedule not in GUIDANCE_OF_CODES:
        raise ConfigError(
            f"backbone {config.backbone} has no sampling.guidance_schedule {schedule!r}: choose "
            f"one of {', '.join(GUIDANCE_OF_CODES)}"
        )
    return codes.CodeSampler(
        model,
        (first, *[later] * (len(model.factor_sizes) - 1)),
        guidance_power=power if schedule == "power_cosine" else None,
        guided_positions=sampling.guided_positions,
        trace=trace,
    )
