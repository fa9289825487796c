"""AR with diffusion loss, GPT-XL on KL-16 latents at ImageNet 256x256: "Ours (AR)" with refinement.

Paper:     "Condition Errors Refinement in Autoregressive Image Generation with Diffusion Loss"
           (ICLR 2026), section 4: GPT-XL (LlamaGen's table: 36 blocks of 1280, 20 heads) and MAR's
           denoising module on LDM's KL-16
Recipe:    400 epochs at 2,048 images, 100 epochs of linear warm-up, cosine noise of 1,000 steps,
           average 0.9999. The learning rate is lost in the text; one reading has 1e-5, the default
           here is MAR's 1e-4 per 256 images. Size of the head: MAR-L's (the paper gives none)
Refined:   arcond calibrate --checkpoint runs/ar_xl --config ar_xl_imagenet256:refined, and the same
             config for `arcond sample`: class means apart, and one map of residuals
Command:   arcond train --config ar_xl_imagenet256 --workdir runs/ar_xl
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/kl16
Hardware:  not yet run
Score:     not yet run
"""

from arcond_jax import build
from arcond_jax.configs import imagenet
from arcond_jax.models import gpt, mar


def get_config(variant: str = "plain") -> build.Config:
    if variant not in ("plain", "refined"):
        raise ValueError(f"ar_xl_imagenet256 has no variant {variant!r}: take plain or refined")
    config = imagenet.of_latents("ar", transport="none" if variant == "plain" else "residual")
    config.name = "ar_xl_imagenet256"
    if variant == "refined":
        config.transport.update(num_atoms=1024, num_sources=4)
    config.model.update(**gpt.SIZES["XL"], remat="full")
    head = mar.SIZES["L"]
    config.diffusion_head.update(depth=head["head_depth"], width=head["head_width"])
    config.training.decay_head = False
    config.sampling.update(guidance_scale=3.0, guidance_schedule="linear")
    return config
