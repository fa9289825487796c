"""LlamaGen-B on ImageNet 256x256: 16x16 codes of VQ-16, 111M parameters.

Paper:     Sun et al. (2024), "Autoregressive Model Beats Diffusion"
Recipe:    autoregressive/train/train_c2i.py of FoundationVision/LlamaGen: 300 epochs at 256 images,
           AdamW (0.9, 0.95), constant 1e-4, weight decay 0.05, clipping at 1, dropout 0.1 of tokens
           and branches, labels dropped 0.1. Departure: one centre crop and its mirror image in
           place of ten crops; the average of weights is kept, and is 0.9999
Sampling:  guidance 2, temperature 1, no cuts
Command:   arcond train --config configs/llamagen_b_256.py --workdir runs/llamagen_b_256
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/vq16
Hardware:  not yet run
Score:     not yet run; official weights in the official code: FID 5.46
"""

import ml_collections

from arcond_jax.models import gpt
from configs import imagenet


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"llamagen_b_256 has no variants, so not {variant!r}")
    return sized("llamagen_b_256", "B", guidance_scale=2.0)


def sized(
    name: str, size: str, *, guidance_scale: float, image_size: int = 256
) -> ml_collections.ConfigDict:
    """The recipe for one of the published sizes."""
    config = imagenet.of_codes("vq", batch_size=256, image_size=image_size)
    config.name = name
    config.gpt.update(**gpt.SIZES[size], dropout=0.1, remat="full")
    config.loss.token_dropout = 0.1
    config.training.update(
        num_train_steps=300 * (imagenet.NUM_IMAGES // 256),
        num_warmup_steps=0,
        learning_rate=1e-4,
        weight_decay=0.05,
        clip_norm=1.0,
    )
    config.sampling.guidance_scale = guidance_scale
    return config
