"""MAR-H on ImageNet 256x256; recipe and paper as in mar_base_imagenet256.

Sampling:  256 steps, 100 evaluations of the head, guidance to 3.2 along a line, temperature 1
Command:   arcond train --config mar_huge_imagenet256 --workdir runs/mar_huge
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/kl16
Hardware:  not yet run
Score:     not yet run; official weights in the official code: FID 1.55, IS 303.7
"""

from arcond_jax import build
from arcond_jax.configs import mar_base_imagenet256


def get_config() -> build.Config:
    return mar_base_imagenet256.sized("mar_huge_imagenet256", "H", guidance_scale=3.2)
