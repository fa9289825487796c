"""The digits configs made so small that compiling them, which is all the cost, takes seconds."""

import flax.linen as nn
import jax
import numpy as np

from arcond_jax import build, types

OVERRIDES = (
    "data.batch_size=16",
    "loss.num_copies=1",
    "training.num_train_steps=6",
    "training.num_warmup_steps=2",
    "training.learning_rate=1e-2",
    "training.decay=constant",  # the compiled step is then the same for every number of steps
    "training.ema_decay=0.9",
    "training.log_every=1",
    "training.checkpoint_every=2",
    "training.checkpoints_kept=10",
    "transport.num_atoms=32",
    "transport.num_sources=8",
)
BACKBONE = ("model.depth=1", "model.width=16", "model.num_heads=2", "model.mlp_hidden=32")
HEAD = ("diffusion_head.depth=1", "diffusion_head.width=16")
MAR = (
    "model.encoder_depth=1",
    "model.encoder_width=16",
    "model.encoder_num_heads=2",
    "model.decoder_depth=2",
    "model.decoder_width=16",
    "model.decoder_num_heads=2",
)


def overrides(variant: str = "joint") -> tuple[str, ...]:
    """What makes a variant of `digits` small."""
    chosen = OVERRIDES + (MAR if variant == "mar" else BACKBONE)
    if variant in ("joint", "ar", "mar"):
        chosen += HEAD
    else:
        chosen = tuple(x for x in chosen if not x.startswith("loss."))
    if variant not in ("ar", "mar"):
        chosen += ("tokenizer.num_codes=8",)
    return chosen + (("tensorar.window=2",) if variant in ("joint", "tensorar") else ())


def unrefined(variant: str) -> tuple[str, ...]:
    """The same without refinement, so that no bank is filled."""
    chosen = (x for x in overrides(variant) if not x.startswith("transport."))
    return (*chosen, "transport.kind=none")


ON_DIGITS = {"dit": "pixels", "rar": "patches", "llamagen": "patches", "magvit2": "patches"}


def config(variant: str = "joint", *more: str) -> build.Config:
    """A variant of `digits`, or a family that has none there, which `more` is to make small."""
    if variant in ON_DIGITS:
        other = build.config(model=variant, tokenizer=ON_DIGITS[variant], data="digits")
        return build.with_overrides(other, more)
    return build.load_config(f"digits:{variant}", (*overrides(variant), *more))


NUM_SCORED = 80  # more than the 32 features of the small classifier


def scored_config(*more: str) -> build.Config:
    """Of a run that is scored while it trains, without refinement."""
    scores = ("evaluation.every=2", f"evaluation.num_images={NUM_SCORED}")
    settings = (*unrefined("ar"), *scores, "training.log_every=3", *more)
    return build.load_config("digits:ar", settings)


def batch(tiny: build.Config) -> types.Batch:
    """The first images of the training split."""
    split, size = build.source(tiny, "train"), tiny.data.batch_size
    return types.Batch(image=split.image[:size], prompt=split.label[:size])


def random_params(shapes: types.Params, scale: float = 0.2) -> types.Params:
    """Values of the order of one everywhere, also where training starts at zero.

    They come from numpy: initial values would cost the compilation of a generator for each leaf.
    """
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jax.numpy.asarray((centre + scale * rng.normal(size=leaf.shape)).astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))
