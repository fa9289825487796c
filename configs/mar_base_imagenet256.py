"""MAR-B on ImageNet 256x256: masked autoregression with diffusion loss on KL-16 latents.

Paper:     Li et al. (2024), "Autoregressive Image Generation without Vector Quantization", table 4
Recipe:    main_mar.py and README of LTH14/mar: 800 epochs at 2,048 images, 100 epochs of warm-up,
           AdamW (0.9, 0.95), 1e-4 per 256 images, weight decay 0.02 but not on the denoising MLP,
           clipping at 3, average 0.9999, dropout 0.1; 4 noisings of each token
Sampling:  256 steps, 100 evaluations of the head, guidance to 2.9 along a line, temperature 1
           (without guidance: temperature 0.95)
Command:   arcond train --config mar_base_imagenet256 --workdir runs/mar_base
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/kl16
Hardware:  not yet run
Score:     not yet run; official weights in the official code: FID 2.31, IS 281.7
"""

from arcond_jax import build
from arcond_jax.configs import imagenet
from arcond_jax.models import mar


def get_config() -> build.Config:
    return sized("mar_base_imagenet256", "B", guidance_scale=2.9)


def sized(name: str, size: str, *, guidance_scale: float, image_size: int = 256) -> build.Config:
    """The recipe for one of the published sizes."""
    config = imagenet.of_latents("mar", image_size=image_size)
    config.name = name
    sizes = mar.SIZES[size]
    for part in ("encoder", "decoder"):
        for key in ("depth", "width", "num_heads"):
            config.model[f"{part}_{key}"] = sizes[key]
    config.model.remat = "full"
    config.diffusion_head.update(depth=sizes["head_depth"], width=sizes["head_width"])
    config.training.decay_head = False
    config.training.num_train_steps = 800 * imagenet.STEPS_PER_EPOCH
    config.sampling.update(num_ar_steps=256, num_buckets=8)
    config.sampling.update(guidance_scale=guidance_scale, guidance_schedule="linear")
    return config
