"""RAR-XL on ImageNet 256x256: random orders annealed to raster order, 955M parameters.

Paper:     Yu et al. (2024), "Randomized Autoregressive Visual Generation"
Recipe:    configs/training/generator/rar.yaml of bytedance/1d-tokenizer: 400 epochs at 2,048
           images, AdamW (0.9, 0.96), 4e-4 after 100 epochs of warm-up, by half a cosine to 1e-5,
           weight decay 0.03, clipping at 1, dropout 0.1, no average, ten crops; all orders random
           until epoch 200, none from epoch 300 on
Sampling:  guidance to 6.9 along a cosine of power 1.5, temperature 1.02, no cuts
Variants:  tensorar_v1, tensorar_iclr (ours), drafter (ours): see tensorar.py
Command:   arcond train --config rar_xl --workdir runs/rar_xl
             --config.data.directory=CODES --config.tokenizer.path=weights/maskgit_vq
Hardware:  not yet run
Score:     not yet run; official weights in the official code: FID 1.50
"""

from arcond_jax import build
from arcond_jax.configs import rar_b, tensorar


def get_config(variant: str = "") -> build.Config:
    return tensorar.of(
        rar_b.sized("rar_xl", "XL", guidance_scale=6.9, guidance_power=1.5, temperature=1.02),
        variant,
    )
