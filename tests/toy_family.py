"""The record of the toy backbone, and its config: all that the library is told of it."""

import math

from toy_model import Bag

from arcond_jax import build
from arcond_jax.build import family, keys, tokens
from arcond_jax.convert import table
from arcond_jax.models import causal, losses


def network(config):
    return family.windowed(
        config,
        Bag(
            length=math.prod(tokens.grid(config)),
            num_codes=tokens.num_codes(config),
            num_classes=config.data.num_classes,
            width=config.model.width,
        ),
    )


def generator(config, fitted):
    return causal.Generator(
        network(config), (losses.CodeLoss(),), family.drafts(config, fitted), **config.loss
    )


def rows(network):
    return [
        table.row("class_embed/table", "labels.weight"),
        table.row("code_embed/table", "codes.weight"),
        table.row("position", "position"),
        *table.linear("hidden", "hidden"),
        *table.linear("code_head", "head", use_bias=False),
    ]


BAG = build.register(
    build.Family(
        name="bag",
        sections={
            "model": {"width": keys.integer(16)},
            "loss": family.PROMPT_LOSS,
            "sampling": family.GUIDED | family.CODES,
        },
        draws=("codes",),
        network=network,
        sampler=family.causal_sampler,
        generator=generator,
        conditions=family.each_position,
        official=build.Official("bag", (), rows),
    )
)


def get_config():
    config = build.config(model="bag", tokenizer="patches", data="digits", transport="bures")
    config.name = "bag"
    config.tokenizer.num_codes = 8
    config.data.batch_size = 16
    config.training.update(num_train_steps=20, num_warmup_steps=2, learning_rate=1e-2)
    config.training.update(log_every=1, ema_decay=0.9)
    config.transport.update(num_atoms=32, num_sources=8)
    return config
