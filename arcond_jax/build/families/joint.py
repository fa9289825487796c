"""Latents drawn one after another from a causal backbone, with codes on their grid or without."""

from arcond_jax import types
from arcond_jax.build import family, keys, tokens
from arcond_jax.config import Config, ConfigError
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.models import causal, joint, losses

W_DIFFUSION = {"w_diffusion": keys.weight(1.0)}
CODES_TOO = {
    "w_tensor": keys.weight(0.3),
    "code_dropout": keys.number(0.0, low=0.0, high=1.0),
}
WARM_START = {"warm_start": keys.positive(None, high=1.0, optional=True)}


def latents_network(config: Config) -> joint.Joint:
    """The model of latents alone."""
    return joint.Joint(
        num_classes=config.data.num_classes,
        head=family.denoiser(config),
        **family.prompted(config),
    )


def joint_network(config: Config) -> types.CausalModel:
    """The model of codes and latents."""
    inner = joint.Joint(
        num_classes=config.data.num_classes,
        head=family.denoiser(config),
        num_codes=tokens.num_codes(config),
        **family.prompted(config),
    )
    return family.windowed(config, inner)


def _latent_loss(config: Config) -> losses.LatentLoss:
    loss = config.loss
    return losses.LatentLoss(
        schedule_lib.Schedule.cosine(),
        weight=loss.w_diffusion,
        num_copies=loss.num_copies,
        code_dropout=loss.get("code_dropout", 0.0),
    )


def latents_generator(config: Config, fitted: types.Tokenizer | None) -> causal.Generator:
    """The diffusion loss alone."""
    del fitted
    dropout = config.loss.label_dropout
    return causal.Generator(latents_network(config), (_latent_loss(config),), label_dropout=dropout)


def joint_generator(config: Config, fitted: types.Tokenizer | None) -> causal.Generator:
    """Cross-entropy of codes and diffusion loss of latents, in one step."""
    return causal.Generator(
        joint_network(config),
        (family.code_loss(config, config.loss.w_tensor), _latent_loss(config)),
        **family.windows_of(config, fitted),
        label_dropout=config.loss.label_dropout,
    )


def _check_joint(config: Config) -> None:
    family.check_gpt(config)
    if config.loss.w_diffusion == config.loss.w_tensor == 0:
        raise ConfigError("loss.w_diffusion and loss.w_tensor are both 0: nothing is trained")
    if family.is_drafter(config):
        raise ConfigError("tensorar.drafter guesses codes alone, and model joint draws latents too")


LATENTS = family.Family(
    name="ar",
    sections={
        "model": family.GPT,
        "diffusion_head": family.HEAD,
        "loss": family.PROMPT_LOSS | {"w_diffusion": keys.positive(1.0)} | family.LATENT_LOSS,
        "training": family.HEAD_DECAY,
        "sampling": family.GUIDED | family.GUIDED_POSITIONS | family.LATENTS,
    },
    draws=("latents",),
    network=latents_network,
    sampler=family.causal_sampler,
    generator=latents_generator,
    conditions=family.each_position,
    check=family.check_gpt,
)
BOTH = family.Family(
    name="joint",
    sections={
        "model": family.GPT,
        "diffusion_head": family.HEAD,
        "loss": family.PROMPT_LOSS | W_DIFFUSION | CODES_TOO | family.LATENT_LOSS,
        "training": family.HEAD_DECAY,
        "sampling": family.GUIDED
        | family.GUIDED_POSITIONS
        | family.CODES
        | family.LATENTS
        | WARM_START,
    },
    draws=("codes", "latents"),
    network=joint_network,
    sampler=family.causal_sampler,
    generator=joint_generator,
    conditions=family.each_position,
    check=_check_joint,
)
