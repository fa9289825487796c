"""LlamaGen-B on ImageNet 256x256: 16x16 codes of VQ-16, 111M parameters.

Paper:     Sun et al. (2024), "Autoregressive Model Beats Diffusion"
Recipe:    autoregressive/train/train_c2i.py of FoundationVision/LlamaGen: 300 epochs at 256 images,
           AdamW (0.9, 0.95), constant 1e-4, weight decay 0.05, clipping at 1, dropout 0.1 of tokens
           and branches, labels dropped 0.1; ten crops. Departure: the average of weights is
           kept, and is 0.9999
Sampling:  guidance 2, temperature 1, no cuts
Variants:  tensorar_v1 (FID 4.75, paper), tensorar_iclr, drafter (ours): see tensorar.py
Command:   arcond train --config llamagen_b_256 --workdir runs/llamagen_b_256
             --config.data.directory=CODES --config.tokenizer.path=weights/vq16
Hardware:  not yet run
Score:     not yet run; official weights in the official code: FID 5.46
"""

from arcond_jax import build
from arcond_jax.configs import imagenet, tensorar
from arcond_jax.models import gpt


def get_config(variant: str = "") -> build.Config:
    return tensorar.of(sized("llamagen_b_256", "B", guidance_scale=2.0), variant)


def sized(name: str, size: str, *, guidance_scale: float, image_size: int = 256) -> build.Config:
    """The recipe for one of the published sizes."""
    config = imagenet.of_codes(
        "llamagen", "vq", batch_size=256, image_size=image_size, ten_crops=True
    )
    config.name = name
    config.model.update(**gpt.SIZES[size], dropout=0.1, token_dropout=0.1, remat="full")
    config.training.update(
        num_train_steps=300 * (imagenet.NUM_IMAGES // 256),
        num_warmup_steps=0,
        learning_rate=1e-4,
        weight_decay=0.05,
        clip_norm=1.0,
    )
    config.sampling.guidance_scale = guidance_scale
    return config
