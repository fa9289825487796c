"""What an update communicates: its weights and their gradients, and nothing of the batch's size."""

import math

import flax.linen as nn
import jax
import pytest
import tiny

from arcond_jax import aot, build
from arcond_jax.models import losses
from arcond_jax.parallel import topology

BATCH = 8 * 23  # unlike any other size
BLOCKS = ("model.depth=2", "model.width=32", "model.num_heads=2")
VARIANTS = {
    "joint": ("diffusion_head.depth=2", "loss.num_copies=3", "model.remat=full"),
    "tensorar": (
        "tensorar.window=3",
        "tensorar.drafts=noised",
        "tensorar.noise=self",
        "training.dtype=bfloat16",
    ),
    "mar": ("diffusion_head.depth=2", "loss.num_copies=3"),
    "dit": BLOCKS,
    "rar": (*BLOCKS, "model.mlp_hidden=64", "tokenizer.num_codes=64"),
    "llamagen": (*BLOCKS, "tokenizer.num_codes=64"),
    "magvit2": (*BLOCKS, "tokenizer.num_codes=64", "model.factor_sizes=(8,8)"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_moves_its_weights_and_no_activations(variant, monkeypatch):
    """Two gathers and a reduction of every weight, with parameters cut over all devices."""
    monkeypatch.setattr(losses, "ROWS", 2 * 23)  # windows come in eight pieces
    settings = (f"data.batch_size={BATCH}", *VARIANTS[variant], "mesh.data=2", "mesh.fsdp=4")
    config = tiny.config(variant, *settings)
    report = aot.compile_for(config, topology.named("cpu"))
    leaves = jax.tree.leaves(nn.unbox(build.abstract_params(config)))
    largest = max(x.size for x in leaves)
    assert report.collectives
    for x in report.collectives:
        for _, shape in x.shapes:
            assert math.prod(shape) <= largest, x
            assert not [size for size in shape if size and size % 23 == 0], x
    total = sum(x.bytes * x.times for x in report.collectives)
    weights = sum(x.size * x.dtype.itemsize for x in leaves)
    assert 2 * weights < total < 1.5 * 3 * weights
