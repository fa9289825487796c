"""Handwritten digits, 8x8: every part of the library in a few minutes on two CPU cores.

1,437 images to train on, 360 held out; 2x2 patches make 16 positions of 4 numbers and one of 64
codes. Variants:

  joint     codes and latents (default): weights 1 and 0.3, window 4 with drafts masked
  ar        latents only: autoregression with diffusion loss
  tensorar  codes only, window 4
  base      codes only, window 1
  mar       latents only, masked: 8 decoding steps in random order

Command:   arcond train --config digits.py:joint --workdir runs/digits
Hardware:  2 CPU cores
Hours:     0.03
Score:     what `arcond demo` prints
"""

from arcond_jax import build

# Model, tokenizer and refinement; the joint model and "tensorar" have windows.
VARIANTS = {
    "joint": ("joint", "patches", "stored"),
    "ar": ("ar", "pixels", "stored"),
    "tensorar": ("llamagen", "patches", "stored"),
    "base": ("llamagen", "patches", "stored"),
    "mar": ("mar", "pixels", "bures"),
}


def get_config(variant: str = "joint") -> build.Config:
    if variant not in VARIANTS:
        raise ValueError(f"digits has no variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    model, tokenizer, transport = VARIANTS[variant]
    windows = variant in ("joint", "tensorar")
    config = build.config(
        model=model, tokenizer=tokenizer, data="digits", transport=transport, windows=windows
    )
    config.name = f"digits_{variant}"
    config.training.update(
        num_train_steps=1200,
        num_warmup_steps=100,
        learning_rate=2e-3,
        decay="cosine",
        ema_decay=0.995,
        checkpoint_every=400,
    )
    if variant == "mar":
        sizes = dict(depth=2, width=64, num_heads=4)
        config.model.update(
            {f"{x}_{k}": v for x in ("encoder", "decoder") for k, v in sizes.items()}
        )
        # MAR's 0.7 would never show more than 4 of the 16 tokens.
        config.loss.mask_rate_min = 0.05
        config.model.update(buffer_size=4, attention_dropout=0.0, dropout=0.0)
        config.training.num_train_steps = 2400
        config.sampling.num_ar_steps = 8
    else:
        config.model.update(depth=4, width=64, num_heads=4, mlp_hidden=176)
    if windows:
        config.tensorar.depth = 1
    if variant in ("tensorar", "base"):
        config.loss.w_tensor = 0.3
        config.sampling.code_temperature = 0.7
    else:
        config.diffusion_head.update(depth=3, width=96)
        config.loss.num_copies = 2
        config.sampling.clip_latents = 2.0
    if variant == "joint":
        # One head evaluation from the code's Gaussian, noised to 0.4 of the process.
        config.sampling.update(solver="ddim", num_head_evaluations=1, warm_start=0.4)
    return config
