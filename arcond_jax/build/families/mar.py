"""MAR: latents in random order, several at each decoding step."""

import jax.numpy as jnp

from arcond_jax import types
from arcond_jax.build import family, keys, official
from arcond_jax.config import Config, ConfigError
from arcond_jax.convert import mar as table
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.models import mar
from arcond_jax.sampling import mar as mar_sampling

PARTS = ("encoder", "decoder")


def network(config: Config) -> mar.MAR:
    """The Linen module."""
    return mar.MAR(
        num_classes=config.data.num_classes,
        head=family.denoiser(config),
        **family.place(config),
        **family.sizes(config),
    )


def generator(config: Config, fitted: types.Tokenizer | None) -> mar.Generator:
    """The diffusion loss at masked positions."""
    del fitted
    return mar.Generator(network(config), schedule_lib.Schedule.cosine(), **config.loss)


def sampler(
    config: Config, network: mar.MAR, *, trace: bool, num_known: int
) -> mar_sampling.MARSampler:
    """The loop over decoding steps."""
    return mar_sampling.MARSampler(
        network,
        family.solver(config),
        num_ar_steps=config.sampling.num_ar_steps,
        num_buckets=config.sampling.num_buckets,
        guidance=family.guidance(config),
        num_known=num_known,
        trace=trace,
    )


def conditions(config: Config) -> family.Conditions:
    """A condition at each decoding step of the sampler, for any position that is due in it."""
    starts = mar_sampling.step_starts(network(config).length, config.sampling.num_ar_steps)
    return family.Conditions(
        num_slots=len(starts),
        width=config.model.decoder_width,
        one_by_one=False,
        arguments={"starts": jnp.asarray(starts)},
    )


def check(config: Config) -> None:
    """Raises ConfigError if a width does not fall into heads, or the decoder is one block."""
    if config.model.decoder_depth < 2:
        raise ConfigError(
            f"model.decoder_depth {config.model.decoder_depth} must be at least 2: the last block "
            "stands apart"
        )
    for part in PARTS:
        width, num_heads = (config.model[f"{part}_{name}"] for name in ("width", "num_heads"))
        if width % num_heads:
            raise ConfigError(
                f"model.{part}_width {width} is not divisible by model.{part}_num_heads {num_heads}"
            )


MAR = family.Family(
    name="mar",
    sections={
        "model": {f"{part}_{name}": key for part in PARTS for name, key in family.ATTENTION.items()}
        | {
            "buffer_size": keys.integer(64),
            "attention_dropout": keys.share(0.1),
            "dropout": keys.share(0.1),
        }
        | family.COMPUTE,
        "diffusion_head": family.HEAD,
        "loss": family.PROMPT_LOSS
        | family.LATENT_LOSS
        | {"mask_rate_min": keys.positive(0.7, high=keys.NEARLY_1)},
        "training": family.HEAD_DECAY,
        "sampling": family.GUIDED
        | family.GUIDED_POSITIONS
        | family.LATENTS
        | {"num_ar_steps": keys.integer(64), "num_buckets": keys.integer(8)},
    },
    draws=("latents",),
    network=network,
    sampler=sampler,
    generator=generator,
    conditions=conditions,
    official=official.Official(
        "mar",
        (
            "mar_base_imagenet256",
            "mar_large_imagenet256",
            "mar_huge_imagenet256",
            "mar_large_imagenet512",
        ),
        table.rows,
        ema=("model_ema",),
        raw=("model",),
        container=("model", "model_ema"),  # --resume of main_mar.py reads both
    ),
    keeps_tokens=True,
    check=check,
)
