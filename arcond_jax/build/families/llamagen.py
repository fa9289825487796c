"""LlamaGen, from a class or from a caption."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from arcond_jax import types
from arcond_jax.build import family, keys, official, tokens
from arcond_jax.config import Config
from arcond_jax.convert import llamagen as table
from arcond_jax.models import causal, llamagen, prompted

SIZES = ("b", "l", "xl", "xxl", "3b")
W_TENSOR = {"w_tensor": keys.positive(1.0)}


def network(config: Config) -> types.CausalModel:
    """The model of classes."""
    inner = llamagen.LlamaGen(
        num_classes=config.data.num_classes,
        num_codes=tokens.num_codes(config),
        **family.prompted(config),
    )
    return family.windowed(config, inner)


def captioned_network(config: Config) -> types.CausalModel:
    """The model of captions."""
    apart = ("num_caption_vectors", "caption_width")
    inner = llamagen.LlamaGen(
        num_classes=None,
        caption_width=config.model.caption_width,
        num_codes=tokens.num_codes(config),
        **family.prompted(config, *apart, num_prefix=config.model.num_caption_vectors),
    )
    return family.windowed(config, inner)


def generator(config: Config, fitted: types.Tokenizer | None) -> causal.Generator:
    """Cross-entropy of codes."""
    return causal.Generator(
        FAMILIES[config.model.name].network(config),
        (family.code_loss(config, config.loss.w_tensor),),
        **family.windows_of(config, fitted),
        label_dropout=config.loss.label_dropout,
    )


def _pixels(num_prefix: int) -> Callable[..., int | None]:
    """By the table of positions that early checkpoints hold, or by the name of the file."""

    def pixels(stem: str, state: Mapping[str, np.ndarray]) -> int | None:
        positions = state.get(table.POSITIONS)
        if positions is not None:
            return table.STRIDE * math.isqrt(len(positions) - num_prefix)
        named = [size for size in (256, 384, 512) if str(size) in stem]
        return named[0] if len(named) == 1 else None

    return pixels


def _official(name: str, configs: tuple[str, ...], num_prefix: int) -> official.Official:
    return official.Official(
        name,
        configs,
        table.rows,
        ema=("model", "module", "state_dict"),
        raw=("model", "module", "state_dict"),
        container=("model",),
        ignored=table.IGNORED,
        pixels=_pixels(num_prefix),
        fits=lambda config: "tensorar" not in config and not config.model.qk_norm,
    )


CLASSES = family.Family(
    name="llamagen",
    sections={
        "model": family.GPT,
        "loss": family.PROMPT_LOSS | W_TENSOR,
        "sampling": family.GUIDED | family.GUIDED_POSITIONS | family.CODES,
    },
    draws=("codes",),
    network=network,
    sampler=family.causal_sampler,
    generator=generator,
    conditions=family.each_position,
    official=_official(
        "llamagen",
        tuple(f"llamagen_{size}_{pixels}" for pixels in (256, 384) for size in SIZES),
        num_prefix=1,
    ),
    check=family.check_gpt,
)
CAPTIONS = family.Family(
    name="llamagen_t2i",
    sections={
        "model": family.GPT
        | {
            "num_caption_vectors": keys.integer(prompted.NUM_CAPTION_VECTORS),
            "caption_width": keys.integer(prompted.CAPTION_WIDTH),
        },
        # Captions to train with, one for each class folder, from `arcond captions`.
        "data": {
            "num_classes": keys.integer(0, low=0),
            "captions": keys.text(None, optional=True),
        },
        "loss": family.PROMPT_LOSS | W_TENSOR,
        "sampling": family.GUIDED | family.GUIDED_POSITIONS | family.CODES,
    },
    draws=("codes",),
    network=captioned_network,
    sampler=family.causal_sampler,
    generator=generator,
    official=_official(
        "llamagen_t2i",
        ("llamagen_t2i_xl_256", "llamagen_t2i_xl_512"),
        num_prefix=prompted.NUM_CAPTION_VECTORS,
    ),
    prompts="captions",
    check=family.check_gpt,
)
FAMILIES = {record.name: record for record in (CLASSES, CAPTIONS)}
