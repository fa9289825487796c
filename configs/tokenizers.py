"""The released tokenizers at their sizes, to convert them with; no experiment.

Variants:

  kl16        of MAR, 16 numbers for 16x16 pixels
  vq16, vq8   of LlamaGen, 16,384 codes for 16x16 or 8x8 pixels
  maskgit_vq  of RAR, 1,024 codes for 16x16 pixels
  lfq256      of Open-MAGVIT2, 2^18 codes for 16x16 pixels
  lfq128      of Open-MAGVIT2, 2^18 codes for 8x8 pixels, trained at 128 pixels
"""

from arcond_jax import build
from arcond_jax.configs import imagenet
from arcond_jax.tokenizers import lfq, vq

VARIANTS = ("kl16", "vq16", "vq8", "maskgit_vq", "lfq256", "lfq128")


def get_config(variant: str = "kl16") -> build.Config:
    if variant not in VARIANTS:
        raise ValueError(f"tokenizers has no variant {variant!r}: choose of {', '.join(VARIANTS)}")
    if variant == "kl16":
        config = imagenet.of_latents("ar")
    elif variant == "maskgit_vq":
        config = imagenet.of_codes("llamagen", "maskgit_vq", batch_size=2048)
    elif variant.startswith("vq"):
        config = imagenet.of_codes("llamagen", "vq", batch_size=2048)
        config.tokenizer.update(vq.SIZES[f"VQ-{variant.removeprefix('vq')}"])
    else:
        size = variant.removeprefix("lfq")
        config = imagenet.of_codes("llamagen", "lfq", batch_size=2048, image_size=int(size))
        config.tokenizer.update(lfq.SIZES[size])
    config.name = f"tokenizers_{variant}"
    config.training.dtype = "float32"
    return config
