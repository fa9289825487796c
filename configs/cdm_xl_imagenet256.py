"""CDM, the baseline without autoregression: a diffusion transformer over the whole KL-16 grid.

One static condition, the class, for all tokens: what "Condition Errors Refinement" (ICLR 2026)
compares autoregressive conditions with. Depth, width and heads are GPT-XL's, as in
ar_xl_imagenet256; adaLN makes it larger, 1,069 M parameters.

Paper:     DiT (Peebles and Xie, 2023) for the network; section 4 of the above for the comparison
Recipe:    that of ar_xl_imagenet256: 400 epochs at 2,048 images, cosine noise, learned variance
Command:   arcond train --config cdm_xl_imagenet256 --workdir runs/cdm_xl
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/kl16
Hardware:  not yet run
Score:     not yet run
"""

from arcond_jax import build
from arcond_jax.configs import imagenet
from arcond_jax.models import dit


def get_config() -> build.Config:
    config = imagenet.of_latents("dit")
    config.name = "cdm_xl_imagenet256"
    config.model.update(**dit.SIZES["XL"], remat="full")
    config.sampling.update(guidance_scale=1.5, guidance_schedule="constant")
    return config
