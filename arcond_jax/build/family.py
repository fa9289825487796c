"""What a family of models is to the rest of the library: a record, made by a file of `families`.

From a record everything else follows: which settings a config of the family holds, which tokenizer
it can have, its network, sampler and training, what refinement needs to know, and its official
weights. Also the pieces that several families are made of.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from arcond_jax import types
from arcond_jax.build import keys, tokens
from arcond_jax.build import official as official_lib
from arcond_jax.config import Config, ConfigError
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.diffusion import solvers
from arcond_jax.models import diffusion_head, gpt, losses, tensorar, windows
from arcond_jax.nn import stack
from arcond_jax.sampling import guidance as guidance_lib
from arcond_jax.sampling import heads, raster, speculative, stride

Sampler = Callable[..., Any]  # (params, rng, prompt, *, refiner, ...) -> sampled.Sampled
Generator = Any  # a types.Generator, with `conditions` where conditions can be refined


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What refinement needs to know of a model.

    Attributes:
      num_slots: Slots of a bank: positions, or decoding steps.
      width: Of a condition.
      one_by_one: Whether each row decodes one condition after the other, as the term R needs.
      arguments: Of the generator's `conditions`, besides the batch.
    """

    num_slots: int
    width: int
    one_by_one: bool = True
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
      name: `model.name` of its configs.
      sections: Settings by section: `model`, and what it adds to `data`, `loss`, `training` and
        `sampling`, or sections of its own.
      draws: Kinds of token it draws, of "latents" and "codes".
      network: The Linen module.
      sampler: The loop for a network, by keyword `trace` and `num_known`.
      generator: Initialisation and training loss, given the fitted tokenizer or None; None for a
        family that is sampled only.
      conditions: None where there is no condition that could be refined.
      official: Its official weights; None where nobody else has such models.
      prompts: "classes" or "captions".
      keeps_tokens: Whether its sampler can keep given tokens.
      num_prefix: Rows before those of the grid in its tables of positions; None: all that are not
        the grid's.
      check: Raises ValueError for settings that do not go together.
    """

    name: str
    sections: Mapping[str, keys.Section]
    draws: tuple[str, ...]
    network: Callable[[Config], Any]
    sampler: Callable[..., Sampler]
    generator: Callable[[Config, types.Tokenizer | None], Generator] | None = None
    conditions: Callable[[Config], Conditions] | None = None
    official: official_lib.Official | None = None
    prompts: str = "classes"
    keeps_tokens: bool = False
    num_prefix: int | None = None
    check: Callable[[Config], None] = lambda config: None


# Sections of settings that several families share.

ATTENTION = {
    "depth": keys.integer(12),
    "width": keys.integer(768),
    "num_heads": keys.integer(12),
}
COMPUTE = {
    "remat": keys.choice("none", stack.REMAT),
    "unroll": keys.integer(1),  # `depth` for all: faster on a CPU
}
GPT = (
    ATTENTION
    | {
        "mlp_hidden": keys.integer(None, optional=True),  # LlamaGen's rule
        "num_kv_heads": keys.integer(None, optional=True),  # as many as num_heads
        "qk_norm": keys.flag(False),
        "dropout": keys.share(0.0),
        "attention_dropout": keys.share(0.0),
        "token_dropout": keys.share(0.0),
    }
    | COMPUTE
)
HEAD = {"depth": keys.integer(6), "width": keys.integer(1024)}
PROMPT_LOSS = {"label_dropout": keys.number(0.1, low=0.0, high=1.0)}
LATENT_LOSS = {"num_copies": keys.integer(4)}
HEAD_DECAY = {"decay_head": keys.flag(True)}  # False spares the denoising MLP
TENSORAR = {
    "window": keys.integer(4),
    "depth": keys.integer(2),
    "mlp_ratio": keys.integer(4, low=0),
    "drafts": keys.choice("masked", windows.SHOWN),
    "noise": keys.choice("categorical", windows.NOISES),
    "noise_schedule": keys.choice("exponential", tuple(windows.SCHEDULES)),
    "nested": keys.flag(True),
    "draft_weight": keys.weight(1.0),
    "draft_weights": keys.weights(),  # of each entry from 1 on; the same for all
    "projection": keys.flag(False),  # of what the encoder adds, as in the ICLR version
    "residual": keys.flag(True),
    "base_rate": keys.number(1.0, low=0.0, high=1.0),  # of the learning rate; 0 freezes the base
    "drafter": keys.flag(False),  # guesses beside a frozen base, in the place of windows fed back
}
GUIDED = {
    "guidance_scale": keys.number(1.0, low=-1000.0, high=1000.0),
    "guidance_schedule": keys.choice("constant", guidance_lib.SCHEDULES),
    "guidance_power": keys.number(
        None, low=0.0, high=1000.0, optional=True
    ),  # of "power_cosine" alone
}
GUIDED_POSITIONS = {"guided_positions": keys.integer(None, low=0, optional=True)}  # all
CODES = {
    "code_temperature": keys.positive(1.0),
    "top_k": keys.integer(None, optional=True),
    "top_p": keys.positive(None, high=1.0, optional=True),
    "min_p": keys.number(None, low=0.0, high=1.0, optional=True),
}
DRAFTS = {
    "drafts": keys.choice("off", heads.DRAFTS),
    "renoise": keys.flag(False),  # with the noise of training
}
STRIDE = {"stride": keys.integer(1)}
SPECULATIVE = {
    "speculative": keys.flag(False),
    "relaxed_acceptance": keys.number(1.0, low=1.0, high=keys.LARGEST),  # above 1 is lossy
}
LATENTS = {
    "solver": keys.choice("ancestral", solvers.KINDS),
    "num_head_evaluations": keys.integer(25),
    "spacing": keys.choice("trailing", schedule_lib.SPACINGS),
    "latent_temperature": keys.weight(1.0),
    "clip_latents": keys.positive(None, optional=True),
}


def place(config: Config) -> dict[str, Any]:
    """Where a network lies: its grid of tokens, and the type it computes in."""
    return dict(grid=tokens.grid(config), dtype=tokens.DTYPES[config.training.dtype])


def sizes(config: Config, *apart: str) -> dict[str, Any]:
    """The settings of the section `model` that go to one constructor."""
    return {name: x for name, x in config.model.items() if name not in ("name", *apart)}


def prompted(config: Config, *apart: str, num_prefix: int = 1) -> dict[str, Any]:
    """What `models.prompted.Prompted` is made of; `apart` are settings of the model's own."""
    backbone = gpt.GPT(
        **place(config), num_prefix=num_prefix, **sizes(config, "token_dropout", *apart)
    )
    return dict(backbone=backbone, token_dropout=config.model.token_dropout)


def windowed(config: Config, inner: Any) -> Any:
    """TensorAR or a drafter around a model of codes, if the config has windows."""
    if not has_windows(config):
        return inner
    section = config.tensorar
    parts = dict(
        inner=inner,
        num_heads=config.model.num_heads,
        depth=section.depth,
        mlp_ratio=section.mlp_ratio,
        remat=config.model.remat,
        dtype=tokens.DTYPES[config.training.dtype],
    )
    if section.drafter:
        return tensorar.Drafter(num_drafts=section.window - 1, **parts)
    chosen = {name: section[name] for name in ("window", "projection", "residual")}
    return tensorar.Windowed(**chosen, **parts)


def has_windows(config: Config) -> bool:
    """Whether more than the next code is predicted."""
    return "tensorar" in config and config.tensorar.window > 1


def is_drafter(config: Config) -> bool:
    """Whether that is all that is trained."""
    return "tensorar" in config and config.tensorar.drafter


def base_rate(config: Config) -> float:
    """Learning rate of the model inside windows, as a share of that of the windows' own parts."""
    if is_drafter(config):
        return 0.0
    return config.tensorar.base_rate if "tensorar" in config else 1.0


def code_loss(config: Config, weight: float = 1.0) -> losses.Loss:
    """Cross-entropy of codes, or of a drafter's guesses alone."""
    if "tensorar" not in config:
        return losses.CodeLoss(weight)
    section = config.tensorar
    weights = None if section.draft_weights is None else tuple(section.draft_weights)
    if section.drafter:
        return losses.DraftLoss(weights)
    return losses.CodeLoss(weight, section.draft_weight, weights)


def windows_of(config: Config, fitted: types.Tokenizer | None) -> dict[str, Any]:
    """What `models.causal.Generator` is told of windows: what they show, and what is frozen."""
    return dict(drafts=drafts(config, fitted), frozen=base_rate(config) == 0)


def drafts(config: Config, fitted: types.Tokenizer | None) -> windows.Drafts:
    """What windows show in training."""
    if "tensorar" not in config:
        return windows.Drafts()
    codebook, table = None, tokens.kind_of(config).codebook
    if config.tensorar.noise == "codebook" and table is not None and fitted is not None:
        codebook = np.asarray(table(fitted))
    names = ("drafts", "noise", "noise_schedule", "nested")
    return windows.Drafts(codebook=codebook, **{name: config.tensorar[name] for name in names})


def denoiser(config: Config) -> diffusion_head.DiffusionHead:
    """The denoising MLP."""
    return diffusion_head.DiffusionHead(
        channels=tokens.token_channels(config),
        remat=config.model.remat,
        dtype=tokens.DTYPES[config.training.dtype],
        **config.diffusion_head,
    )


def solver(config: Config) -> solvers.Solver:
    """The chain along which latents are drawn."""
    sampling, process = config.sampling, schedule_lib.Schedule.cosine()
    start = sampling.get("warm_start")
    try:
        timesteps = schedule_lib.spaced_timesteps(
            process,
            sampling.num_head_evaluations,
            spacing=sampling.spacing,
            start=1.0 if start is None else start,
        )
    except ValueError as error:
        names = [x for x in ("num_head_evaluations", "spacing", "warm_start") if x in sampling]
        given = ", ".join(f"sampling.{x} {sampling[x]}" for x in names)
        raise ConfigError(f"{given} do not go together: {error}") from None
    return solvers.Solver(
        process.respace(timesteps),
        kind=sampling.solver,
        temperature=sampling.latent_temperature,
        clip=sampling.clip_latents,
    )


def guidance(config: Config) -> guidance_lib.Guidance:
    """Classifier-free guidance."""
    sampling = config.sampling
    return guidance_lib.Guidance(
        scale=sampling.guidance_scale,
        later_scale=sampling.get("later_guidance_scale"),
        schedule=sampling.guidance_schedule,
        power=sampling.guidance_power,
        positions=sampling.get("guided_positions"),
    )


def code_head(config: Config) -> heads.Codes:
    """What draws codes."""
    sampling = config.sampling
    return heads.Codes(
        temperature=sampling.code_temperature,
        later_temperature=sampling.get("later_code_temperature"),
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        drafts=sampling.get("drafts", "off"),
        renoise=renoise(config),
    )


def renoise(config: Config) -> windows.Noise | None:
    """Noise on drafts that are fed back: that of training."""
    if not config.sampling.get("renoise"):
        return None
    section = config.tensorar
    levels = windows.noise_levels(section.noise_schedule, section.window)
    return windows.Noise(section.noise, levels, section.nested)


def noise_codebook(config: Config, fitted: types.Tokenizer) -> tokens.Codebook | None:
    """The vectors that this noise goes through; None where it needs none."""
    if not config.sampling.get("renoise") or config.tensorar.noise != "codebook":
        return None
    table = tokens.kind_of(config).codebook
    assert table is not None
    return table(fitted)


def causal_sampler(config: Config, network: Any, *, trace: bool, num_known: int) -> Sampler:
    """The raster loop, with a head for each kind of token that the model has."""
    assert num_known == 0
    made = ()
    if network.factor_sizes:
        made += (code_head(config),)
    if network.channels is not None:
        made += (heads.Latents(solver(config), config.sampling.get("warm_start") is not None),)
    dtype = tokens.DTYPES[config.training.dtype]
    loop = raster.Raster(network, made, guidance(config), trace, dtype)
    if config.sampling.get("speculative"):
        return speculative.Speculative(loop, config.sampling.relaxed_acceptance)
    codes_a_step = config.sampling.get("stride", 1)
    return loop if codes_a_step == 1 else stride.StrideSampler(loop, codes_a_step)


def each_position(config: Config) -> Conditions:
    """A condition at each position, as wide as the backbone."""
    rows, columns = tokens.grid(config)
    return Conditions(num_slots=rows * columns, width=config.model.width)


def check_heads(config: Config) -> None:
    """Raises ConfigError if the width does not fall into heads."""
    width, num_heads = config.model.width, config.model.num_heads
    if width % num_heads:
        raise ConfigError(f"model.width {width} is not divisible by model.num_heads {num_heads}")


def check_gpt(config: Config) -> None:
    """Raises ConfigError if the width or the heads of the settings `GPT` do not divide."""
    check_heads(config)
    model = config.model
    if model.width // model.num_heads % 4:
        raise ConfigError(
            f"model.width {model.width} over model.num_heads {model.num_heads} is "
            f"{model.width // model.num_heads}: rotary positions in rows and columns need a "
            "multiple of 4"
        )
    if model.num_kv_heads is not None and model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_heads {model.num_heads} is not divisible by model.num_kv_heads "
            f"{model.num_kv_heads}"
        )
