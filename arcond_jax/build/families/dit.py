"""CDM, the baseline without autoregression: a diffusion transformer over the whole grid."""

from arcond_jax import types
from arcond_jax.build import family, keys, tokens
from arcond_jax.config import Config
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.models import dit
from arcond_jax.sampling import grid


def network(config: Config) -> dit.DiT:
    """The Linen module."""
    return dit.DiT(
        channels=tokens.token_channels(config),
        num_classes=config.data.num_classes,
        **family.place(config),
        **family.sizes(config),
    )


def generator(config: Config, fitted: types.Tokenizer | None) -> dit.Generator:
    """The diffusion loss over the whole grid."""
    del fitted
    return dit.Generator(network(config), schedule_lib.Schedule.cosine(), **config.loss)


def sampler(config: Config, network: dit.DiT, *, trace: bool, num_known: int) -> grid.GridSampler:
    """One reverse chain."""
    assert num_known == 0
    return grid.GridSampler(
        network, family.solver(config), guidance=family.guidance(config), trace=trace
    )


DIT = family.Family(
    name="dit",
    sections={
        "model": {
            "depth": keys.integer(28),
            "width": keys.integer(1152),
            "num_heads": keys.integer(16),
        }
        | family.COMPUTE,
        "loss": family.PROMPT_LOSS,
        "sampling": family.GUIDED | family.LATENTS,
    },
    draws=("latents",),
    network=network,
    sampler=sampler,
    generator=generator,
    check=family.check_heads,
)
