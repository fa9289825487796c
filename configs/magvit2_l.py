"""Open-MAGVIT2-L on ImageNet 256x256: codes of 18 bits in two factors, 804M parameters.

Paper:     Luo et al. (2024), "Open-MAGVIT2"
Recipe:    configs/Open-MAGVIT2/gpu/imagenet_conditional_llama_L.yaml of TencentARC/SEED-Voken:
           300 epochs at 768 images, AdamW (0.9, 0.95), 0.0003 after 6 epochs of warm-up, along a
           line to a tenth, weight decay 0.05, clipping at 1, dropout 0.1 of tokens and branches.
           Departures: constant weight decay (there it falls to 0), an average of weights (0.9999)
Sampling:  guidance 1.9 for the first factor and 1.9 for the second, temperatures 1.1 and 1
Variants:  tensorar_v1 (FID 2.35, paper), tensorar_iclr, drafter (ours): see tensorar.py
Command:   arcond train --config magvit2_l --workdir runs/magvit2_l
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/lfq256
Hardware:  not yet run
Score:     not yet run; official weights in the official code: FID 2.51
"""

from arcond_jax import build
from arcond_jax.configs import magvit2_b, tensorar


def get_config(variant: str = "") -> build.Config:
    return tensorar.of(
        magvit2_b.sized(
            "magvit2_l",
            "L",
            guidance_scales=(1.9, 1.9),
            temperatures=(1.1, 1.0),
            num_epochs=300,
            learning_rate=0.0003,
        ),
        variant,
    )
