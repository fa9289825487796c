"""Guided samplers with whole weights on every device need nothing from each other."""

import pytest
import tiny

from arcond_jax import aot, build
from arcond_jax.parallel import topology

GUIDED = ("sampling.guidance_scale=2.0", "data.batch_size=16")
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
ON_DIGITS = {"dit": "pixels", "rar": "patches", "llamagen": "patches", "magvit2": "patches"}
REFINED = [(x, y) for x in ("joint", "mar") for y in ("stored", "residual", "bures")]


def config_of(variant, kind):
    if variant in ON_DIGITS:
        config = build.config(model=variant, tokenizer=ON_DIGITS[variant], data="digits")
        return build.with_overrides(config, (*GUIDED, *VARIANTS[variant]))
    settings = tiny.unrefined(variant) if kind == "none" else tiny.overrides(variant)
    more = (f"transport.kind={kind}", *GUIDED, *VARIANTS[variant])
    return build.load_config(f"digits:{variant}", (*settings, *more))


@pytest.mark.parametrize(
    ("variant", "kind"), [*((variant, "none") for variant in VARIANTS), *REFINED]
)
def test_a_guided_sampler_does_not_communicate(variant, kind):
    config = config_of(variant, kind)
    report = aot.compile_for(config, topology.named("cpu"), what="sample")
    assert report.mesh == {"data": 8, "fsdp": 1, "tensor": 1}
    assert report.collectives == []
