"""Guided samplers with whole weights on every device need nothing from each other."""

import pytest
import tiny

from arcond_jax import aot, build
from arcond_jax.parallel import topology

GUIDED = (
    "sampling.guidance_scale=2.0",
    "sampling.guidance_schedule=linear",
    "data.batch_size=16",
)
BLOCKS = ("model.depth=1", "model.width=32", "model.num_heads=2")
SHORT = ("sampling.num_head_evaluations=2",)
VARIANTS = {
    "joint": ("sampling.drafts=feed", *SHORT),
    "tensorar": ("sampling.top_k=3", "sampling.stride=2"),
    "mar": ("sampling.num_ar_steps=2", "sampling.num_buckets=1", *SHORT),
    "dit": (*BLOCKS, *SHORT),
    "rar": (*BLOCKS, "model.mlp_hidden=64", "tokenizer.num_codes=64"),
    "llamagen": (*BLOCKS, "tokenizer.num_codes=64"),
    "magvit2": (*BLOCKS, "tokenizer.num_codes=64", "model.factor_sizes=(8,8)"),
}
REFINED = [(x, y) for x in ("joint", "mar") for y in ("stored", "residual", "bures")]


@pytest.mark.parametrize(
    ("variant", "kind"), [*((variant, "none") for variant in VARIANTS), *REFINED]
)
def test_a_guided_sampler_does_not_communicate(variant, kind):
    config = tiny.config(variant, *GUIDED, *VARIANTS[variant])
    config = build.with_overrides(config, [f"transport.kind={kind}"])
    report = aot.compile_for(config, topology.named("cpu"), what="sample")
    assert report.mesh == {"data": 8, "fsdp": 1, "tensor": 1}
    assert report.collectives == []
