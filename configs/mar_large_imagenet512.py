"""MAR-L on ImageNet 512x512: 32x32 tokens of KL-16; the rest as in mar_large_imagenet256.

Paper:     Li et al. (2024), table 5 (481 M parameters: 768 more positions in three tables)
Recipe:    that of 256x256; the paper's own schedule at this size is not published
Sampling:  preset of 256x256, not tuned for this size
Command:   arcond train --config configs/mar_large_imagenet512.py --workdir runs/mar_large_512
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/kl16
Hardware:  not yet run
Score:     not yet run; the paper reports FID 1.73 with guidance; no weights were released
"""

import ml_collections

from configs import mar_base_imagenet256


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"mar_large_imagenet512 has no variants, so not {variant!r}")
    return mar_base_imagenet256.sized(
        "mar_large_imagenet512", "L", guidance_scale=3.0, image_size=512
    )
