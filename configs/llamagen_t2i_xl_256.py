"""LlamaGen-XL from text to images of 256x256: 16x16 codes of VQ-16, 778M parameters.

Paper:     Sun et al. (2024), "Autoregressive Model Beats Diffusion"
Recipe:    none here, for official weights alone: stage 1 of the official training
           (scripts/autoregressive/train_t2i_stage1.sh of FoundationVision/LlamaGen), on captions of
           LAION-COCO encoded by FLAN-T5-XL
Sampling:  guidance 7.5, temperature 1, the 1,000 likeliest codes
           (autoregressive/sample/sample_t2i.py)
Command:   arcond convert --family vq --source vq_ds16_t2i.pt --out weights/vq16_t2i
           arcond convert --family llamagen_t2i --source t2i_XL_stage1_256.pt
             --tokenizer weights/vq16_t2i --out weights/t2i
           arcond captions --text "a dog" --out captions.npz
           arcond sample --checkpoint weights/t2i --captions captions.npz --out dog.npz
Hardware:  not yet run
Score:     not yet run
"""

import ml_collections

from arcond_jax.models import gpt
from configs import imagenet


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"llamagen_t2i_xl_256 has no variants, so not {variant!r}")
    return sized("llamagen_t2i_xl_256", "XL")


def sized(name: str, size: str, *, image_size: int = 256) -> ml_collections.ConfigDict:
    """One of the released models; its captions come with sampling."""
    config = imagenet.of_codes("vq", batch_size=256, image_size=image_size)
    config.name = name
    config.backbone = "captioned"
    config.data.num_classes = 0
    config.gpt.update(**gpt.SIZES[size])
    config.sampling.update(guidance_scale=7.5, top_k=1000)
    return config
