"""AR with diffusion loss, GPT-XL on KL-16 latents at ImageNet 256x256: "Ours (AR)" with refinement.

Paper:     "Condition Errors Refinement in Autoregressive Image Generation with Diffusion Loss"
           (ICLR 2026), section 4: GPT-XL (LlamaGen's table: 36 blocks of 1280, 20 heads) and MAR's
           denoising module on LDM's KL-16
Recipe:    400 epochs at 2,048 images, 100 epochs of linear warm-up, cosine noise of 1,000 steps,
           average 0.9999. The learning rate is lost in the text; one reading has 1e-5, the default
           here is MAR's 1e-4 per 256 images. Size of the head: MAR-L's (the paper gives none)
Refined:   arcond calibrate --checkpoint runs/ar_xl --config.transport.kind=residual
             --config.transport.grouping=class --config.transport.num_sources=4
Command:   arcond train --config configs/ar_xl_imagenet256.py --workdir runs/ar_xl
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/kl16
Hardware:  not yet run
Score:     not yet run
"""

import ml_collections

from arcond_jax.models import gpt, mar
from configs import imagenet


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"ar_xl_imagenet256 has no variants, so not {variant!r}")
    config = imagenet.get_config()
    config.name = "ar_xl_imagenet256"
    config.gpt.update(**gpt.SIZES["XL"], remat="full")
    head = mar.SIZES["L"]
    config.diffusion_head.update(depth=head["head_depth"], width=head["head_width"])
    config.sampling.update(guidance_scale=3.0, guidance_schedule="linear")
    return config
