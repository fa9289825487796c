"""Joint model, GPT-XL on KL-16 latents and VQ-16 codes of one grid at ImageNet 256x256.

Each of the 16x16 positions has a code of LlamaGen's tokenizer and a latent of MAR's: the code is
drawn first, and the latent by one head that is told it. Images are those of the latents. Variants:

  joint           the next code (default)
  joint_tensorar  windows of 4 codes, drafts masked

Paper:     none: the two of this library in one model. Backbone (36 blocks of 1280, 20 heads) and
           latents as in "Condition Errors Refinement in Autoregressive Image Generation with
           Diffusion Loss" (ICLR 2026), windows as in "TensorAR: Refinement is All You Need in
           Autoregressive Image Generation" (arXiv v1, May 2025); head of MAR-L
Recipe:    that of ar_xl_imagenet256, 400 epochs at 2,048 images; weight 1 of the diffusion loss and
           0.3 of the codes', as on digits. Nothing of it was tuned at this size
Refined:   arcond calibrate --checkpoint runs/joint_xl --config.transport.kind=residual
             --config.transport.num_atoms=1024 --config.transport.num_sources=4, and the same
             settings for `arcond sample`
Few steps: from a cache, whose var(x | y) / var(x) `arcond encode` prints: the smaller, the better
             --config.sampling.warm_start=0.4 --config.sampling.solver=ddim
             --config.sampling.spacing=trailing --config.sampling.num_head_evaluations=1
Command:   arcond train --config joint_xl_imagenet256 --workdir runs/joint_xl
             --config.data.directory=IMAGENET --config.tokenizer.kl_path=weights/kl16
             --config.tokenizer.vq_path=weights/vq16; from what `arcond encode` made of the images,
             --config.data.name=cache --config.data.directory=CACHE
Hardware:  not yet run
Score:     not yet run
"""

from arcond_jax import build
from arcond_jax.configs import imagenet
from arcond_jax.models import gpt, mar


def get_config(variant: str = "joint") -> build.Config:
    if variant not in ("joint", "joint_tensorar"):
        raise ValueError(
            f"joint_xl_imagenet256 has no variant {variant!r}: take joint or joint_tensorar"
        )
    config = imagenet.of_latents("joint", tokenizer="paired")
    config.name = "joint_xl_imagenet256"
    config.model.update(**gpt.SIZES["XL"], remat="full")
    head = mar.SIZES["L"]
    config.diffusion_head.update(depth=head["head_depth"], width=head["head_width"])
    config.training.decay_head = False
    config.sampling.update(guidance_scale=3.0, guidance_schedule="linear")
    if variant == "joint_tensorar":
        config = build.with_windows(config)
        config.name += "_tensorar"
        config.tensorar.update(window=4, drafts="masked")
    return config
