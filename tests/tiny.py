"""The digits configs made so small that compiling them, which is all the cost, takes seconds."""

import flax.linen as nn
import jax
import numpy as np

from arcond_jax import build, types

OVERRIDES = (
    "gpt.depth=1",
    "gpt.width=16",
    "gpt.num_heads=2",
    "gpt.mlp_hidden=32",
    "diffusion_head.depth=1",
    "diffusion_head.width=16",
    "tokenizer.num_codes=8",
    "loss.num_copies=1",
    "data.batch_size=16",
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


def overrides(variant: str = "joint") -> tuple[str, ...]:
    window = 2 if variant in ("joint", "tensorar") else 1
    return (*OVERRIDES, f"tensorar.window={window}")


def config(variant: str = "joint", *more: str) -> build.Config:
    return build.load_config(f"digits:{variant}", (*overrides(variant), *more))


def batch(tiny: build.Config) -> types.Batch:
    """The first images of the training split."""
    split, size = build.source(tiny, "train"), tiny.data.batch_size
    return types.Batch(image=split.image[:size], label=split.label[:size])


def random_params(shapes: types.Params, scale: float = 0.2) -> types.Params:
    """Values of the order of one everywhere, also where training starts at zero.

    They come from numpy: initial values would cost the compilation of a generator for each leaf.
    """
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jax.numpy.asarray((centre + scale * rng.normal(size=leaf.shape)).astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))
