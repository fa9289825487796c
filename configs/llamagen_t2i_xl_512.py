"""LlamaGen-XL from text to images of 512x512: 32x32 codes of VQ-16, 778M parameters.

Paper:     Sun et al. (2024), "Autoregressive Model Beats Diffusion"
Recipe:    none here, for official weights alone: stage 2 of the official training
           (scripts/autoregressive/train_t2i_stage2.sh of FoundationVision/LlamaGen), on internal
           data with captions encoded by FLAN-T5-XL
Sampling:  guidance 7.5, temperature 1, the 1,000 likeliest codes
           (autoregressive/sample/sample_t2i.py)
Command:   as in configs/llamagen_t2i_xl_256.py, from t2i_XL_stage2_512.pt
Hardware:  not yet run
Score:     not yet run
"""

import ml_collections

from configs import llamagen_t2i_xl_256


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    if variant:
        raise ValueError(f"llamagen_t2i_xl_512 has no variants, so not {variant!r}")
    return llamagen_t2i_xl_256.sized("llamagen_t2i_xl_512", "XL", image_size=512)
