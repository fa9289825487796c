"""MAR-B on ImageNet 256x256: masked autoregression with diffusion loss on KL-16 latents.

Paper:     Li et al. (2024), "Autoregressive Image Generation without Vector Quantization", table 4
Recipe:    main_mar.py and README of LTH14/mar: 800 epochs at 2,048 images, 100 epochs of warm-up,
           AdamW (0.9, 0.95), 1e-4 per 256 images, weight decay 0.02 but not on the denoising MLP,
           clipping at 3, average 0.9999, dropout 0.1; 4 noisings of each token
Sampling:  256 steps, 100 evaluations of the head, guidance to 2.9 along a line, temperature 1
           (without guidance: temperature 0.95)
Command:   arcond train --config configs/mar_base_imagenet256.py --workdir runs/mar_base
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/kl16
Hardware:  not yet run
Score:     not yet run; official weights in the official code: FID 2.31, IS 281.7
"""

import ml_collections

from arcond_jax.models import mar
from configs import imagenet


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"mar_base_imagenet256 has no variants, so not {variant!r}")
    return sized("mar_base_imagenet256", "B", guidance_scale=2.9)


def sized(
    name: str, size: str, *, guidance_scale: float, image_size: int = 256
) -> ml_collections.ConfigDict:
    """The recipe for one of the published sizes."""
    config = imagenet.get_config(image_size)
    config.name = name
    config.backbone = "mar"
    sizes = mar.SIZES[size]
    for part in ("encoder", "decoder"):
        for key in ("depth", "width", "num_heads"):
            config.mar[f"{part}_{key}"] = sizes[key]
    config.mar.remat = "full"
    config.diffusion_head.update(depth=sizes["head_depth"], width=sizes["head_width"])
    config.training.num_train_steps = 800 * imagenet.STEPS_PER_EPOCH
    config.sampling.update(num_ar_steps=256, num_buckets=8)
    config.sampling.update(guidance_scale=guidance_scale, guidance_schedule="linear")
    return config
