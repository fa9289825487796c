"""RAR-L on ImageNet 256x256: random orders annealed to raster order, 461M parameters.

Paper:     Yu et al. (2024), "Randomized Autoregressive Visual Generation"
Recipe:    configs/training/generator/rar.yaml of bytedance/1d-tokenizer: 400 epochs at 2,048
           images, AdamW (0.9, 0.96), 4e-4 after 100 epochs of warm-up, by half a cosine to 1e-5,
           weight decay 0.03, clipping at 1, dropout 0.1, no average, ten crops; all orders random
           until epoch 200, none from epoch 300 on
Sampling:  guidance to 15.5 along a cosine of power 2.5, temperature 1.02, no cuts
Variants:  tensorar_v1 (FID 1.66, paper), tensorar_iclr (ours), drafter (ours): see tensorar.py
Command:   arcond train --config rar_l --workdir runs/rar_l
             --config.data.directory=CODES --config.tokenizer.path=weights/maskgit_vq
Hardware:  not yet run
Score:     not yet run; official weights in the official code: FID 1.70
"""

from arcond_jax import build
from arcond_jax.configs import rar_b, tensorar


def get_config(variant: str = "") -> build.Config:
    return tensorar.of(
        rar_b.sized("rar_l", "L", guidance_scale=15.5, guidance_power=2.5, temperature=1.02),
        variant,
    )
