"""RAR: codes in random orders, annealed to raster order."""

from arcond_jax import types
from arcond_jax.build import family, keys, official, tokens
from arcond_jax.config import Config
from arcond_jax.convert import rar as table
from arcond_jax.models import rar

ORDERS = {
    "shuffle_start": keys.integer(None, low=0, optional=True),  # random orders for ever
    "shuffle_stop": keys.integer(None, low=1, optional=True),
}


def network(config: Config) -> types.CausalModel:
    """The Linen module."""
    return family.windowed(
        config,
        rar.RAR(
            num_codes=tokens.num_codes(config),
            num_classes=config.data.num_classes,
            **family.place(config),
            **family.sizes(config),
        ),
    )


def generator(config: Config, fitted: types.Tokenizer | None) -> rar.Generator:
    """Cross-entropy of codes in the order they are visited."""
    return rar.Generator(
        network(config),
        (family.code_loss(config),),
        **family.windows_of(config, fitted),
        **config.loss,
    )


RAR = family.Family(
    name="rar",
    sections={
        "model": family.ATTENTION
        | {
            "depth": keys.integer(24),
            "num_heads": keys.integer(16),
            "mlp_hidden": keys.integer(3072),
            "attention_dropout": keys.share(0.1),
            "dropout": keys.share(0.1),
        }
        | family.COMPUTE,
        "loss": family.PROMPT_LOSS | ORDERS,
        "sampling": family.GUIDED | family.GUIDED_POSITIONS | family.CODES,
    },
    draws=("codes",),
    num_prefix=rar.PREFIX,
    network=network,
    sampler=family.causal_sampler,
    generator=generator,
    conditions=family.each_position,
    official=official.Official(
        "rar",
        ("rar_b", "rar_l", "rar_xl", "rar_xxl"),
        table.rows,
        fits=lambda config: "tensorar" not in config,
    ),
    check=family.check_heads,
)
