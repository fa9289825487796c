"""MAR-L on ImageNet 256x256; recipe and paper as in mar_base_imagenet256.

Sampling:  256 steps, 100 evaluations of the head, guidance to 3.0 along a line, temperature 1
Command:   arcond train --config mar_large_imagenet256 --workdir runs/mar_large
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/kl16
Hardware:  not yet run
Score:     not yet run; official weights in the official code: FID 1.78, IS 296.0
"""

from arcond_jax import build
from arcond_jax.configs import mar_base_imagenet256


def get_config() -> build.Config:
    return mar_base_imagenet256.sized("mar_large_imagenet256", "L", guidance_scale=3.0)
