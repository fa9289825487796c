"""MAR-L on ImageNet 512x512: 32x32 tokens of KL-16; the rest as in mar_large_imagenet256.

Paper:     Li et al. (2024), table 5 (481 M parameters: 768 more positions in three tables)
Recipe:    that of 256x256; the paper's own schedule at this size is not published
Sampling:  preset of 256x256, not tuned for this size
Command:   arcond train --config mar_large_imagenet512 --workdir runs/mar_large_512
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/kl16
Hardware:  not yet run
Score:     not yet run; the paper reports FID 1.73 with guidance; no weights were released
"""

from arcond_jax import build
from arcond_jax.configs import mar_base_imagenet256


def get_config() -> build.Config:
    return mar_base_imagenet256.sized(
        "mar_large_imagenet512", "L", guidance_scale=3.0, image_size=512
    )
