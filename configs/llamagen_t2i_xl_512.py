"""LlamaGen-XL from text to images of 512x512: 32x32 codes of VQ-16, 778M parameters.

Paper:     Sun et al. (2024), "Autoregressive Model Beats Diffusion"
Recipe:    stage 2 (scripts/autoregressive/train_t2i_stage2.sh of FoundationVision/LlamaGen), on 10M
           internal images; the rest as in llamagen_t2i_xl_256
Sampling:  guidance 7.5, temperature 1, the 1,000 likeliest codes
           (autoregressive/sample/sample_t2i.py)
Variants:  tensorar_v1 (ours), tensorar_iclr, drafter (ours): see tensorar.py
Command:   as in llamagen_t2i_xl_256, from t2i_XL_stage2_512.pt
Hardware:  not yet run
Score:     not yet run
"""

from arcond_jax import build
from arcond_jax.configs import llamagen_t2i_xl_256, tensorar


def get_config(variant: str = "") -> build.Config:
    return tensorar.of(
        llamagen_t2i_xl_256.sized("llamagen_t2i_xl_512", "XL", image_size=512), variant
    )
