"""LlamaGen-3B on ImageNet 256x256: 16x16 codes of VQ-16, 3.1B parameters.

Paper:     Sun et al. (2024), "Autoregressive Model Beats Diffusion"
Recipe:    autoregressive/train/train_c2i.py of FoundationVision/LlamaGen: 300 epochs at 256 images,
           AdamW (0.9, 0.95), constant 1e-4, weight decay 0.05, clipping at 1, dropout 0.1 of tokens
           and branches, labels dropped 0.1; ten crops. Departure: the average of weights is
           kept, and is 0.9999
Sampling:  guidance 1.65, temperature 1, no cuts
Variants:  tensorar_v1, tensorar_iclr, drafter (ours): see tensorar.py
Command:   arcond train --config llamagen_3b_256 --workdir runs/llamagen_3b_256
             --config.data.directory=CODES --config.tokenizer.path=weights/vq16
Hardware:  not yet run
Score:     not yet run; no weights were released at this size
"""

from arcond_jax import build
from arcond_jax.configs import llamagen_b_256, tensorar


def get_config(variant: str = "") -> build.Config:
    return tensorar.of(llamagen_b_256.sized("llamagen_3b_256", "3B", guidance_scale=1.65), variant)
