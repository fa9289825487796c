"""Handwritten digits, 8x8: every part of the library in a few minutes on two CPU cores.

1,437 images to train on, 360 held out; 2x2 patches make 16 positions of 4 numbers and one of 64
codes. Variants:

  joint     codes and latents (default): weights 1 and 0.3, window 4 with drafts masked
  ar        latents only: autoregression with diffusion loss
  tensorar  codes only, window 4
  base      codes only, window 1
  mar       latents only, masked: 8 decoding steps in random order

Command:   arcond train --config configs/digits.py:joint --workdir runs/digits
Hardware:  2 CPU cores
Hours:     0.03
Score:     what `arcond demo` prints
"""

import ml_collections

from configs import base

VARIANTS = ("joint", "ar", "tensorar", "base", "mar")


def get_config(variant: str = "joint") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"digits has no variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    config = base.get_config()
    config.name = f"digits_{variant}"

    config.gpt.update(depth=4, width=64, num_heads=4, mlp_hidden=176)
    config.diffusion_head.update(depth=3, width=96)
    config.tensorar.update(window=4, depth=1)
    config.loss.num_copies = 2
    config.training.update(
        num_train_steps=1200,
        num_warmup_steps=100,
        learning_rate=2e-3,
        decay="cosine",
        ema_decay=0.995,
        checkpoint_every=400,
    )
    # One head evaluation from the code's Gaussian, noised to 0.4 of the process.
    config.sampling.update(solver="ddim", num_head_evaluations=1, warm_start=0.4, clip_latents=2.0)
    if variant == "mar":
        config.backbone = "mar"
        config.mar.update(encoder_depth=2, encoder_width=64, encoder_num_heads=4, buffer_size=4)
        config.mar.update(decoder_depth=2, decoder_width=64, decoder_num_heads=4)
        # MAR's 0.7 would never show more than 4 of the 16 tokens.
        config.mar.update(mask_rate_min=0.05, attention_dropout=0.0, dropout=0.0)
        config.transport.kind = "bures"
        config.training.num_train_steps = 2400
        config.sampling.num_ar_steps = 8
    if variant in ("ar", "mar"):
        config.loss.w_tensor = 0.0
        config.tensorar.window = 1
        config.sampling.solver = "ancestral"
        config.sampling.num_head_evaluations = 25
        config.sampling.warm_start = None
    if variant in ("tensorar", "base"):
        config.loss.w_diffusion = 0.0
        config.sampling.warm_start = None
        config.sampling.code_temperature = 0.7
    if variant == "base":
        config.tensorar.window = 1
    return config
