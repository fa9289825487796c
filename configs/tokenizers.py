"""The released tokenizers at their sizes, to convert them with; no experiment.

Variants:

  kl16        of MAR, 16 numbers for 16x16 pixels
  vq16, vq8   of LlamaGen, 16,384 codes for 16x16 or 8x8 pixels
  maskgit_vq  of RAR, 1,024 codes for 16x16 pixels
  lfq256      of Open-MAGVIT2, 2^18 codes for 16x16 pixels
  lfq128      of Open-MAGVIT2, 2^18 codes for 8x8 pixels, trained at 128 pixels
"""

import ml_collections

from arcond_jax.tokenizers import lfq, vq
from configs import imagenet

VARIANTS = ("kl16", "vq16", "vq8", "maskgit_vq", "lfq256", "lfq128")


def get_config(variant: str = "kl16") -> ml_collections.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"tokenizers has no variant {variant!r}: choose of {', '.join(VARIANTS)}")
    if variant == "kl16":
        config = imagenet.get_config()
    elif variant == "maskgit_vq":
        config = imagenet.of_codes("maskgit_vq", batch_size=2048)
    elif variant.startswith("vq"):
        config = imagenet.of_codes("vq", batch_size=2048)
        config.vq.update(vq.SIZES[f"VQ-{variant.removeprefix('vq')}"])
    else:
        size = variant.removeprefix("lfq")
        config = imagenet.of_codes("lfq", batch_size=2048, image_size=int(size))
        config.lfq.update(lfq.SIZES[size])
    config.name = f"tokenizers_{variant}"
    config.training.dtype = "float32"
    return config
