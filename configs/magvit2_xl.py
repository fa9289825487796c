"""Open-MAGVIT2-XL on ImageNet 256x256: codes of 18 bits in two factors, 1.5B parameters.

Paper:     Luo et al. (2024), "Open-MAGVIT2"
Recipe:    configs/Open-MAGVIT2/gpu/imagenet_conditional_llama_XL.yaml of TencentARC/SEED-Voken:
           350 epochs at 768 images, AdamW (0.9, 0.95), 0.00024 after 6 epochs of warm-up, along a
           line to a tenth, weight decay 0.05, clipping at 1, dropout 0.1 of tokens and branches.
           Departures: constant weight decay (there it falls to 0), an average of weights (0.9999)
Sampling:  guidance 1.75 for the first factor and 1.85 for the second, temperatures 1.1 and 1
Variants:  tensorar_v1, tensorar_iclr, drafter (ours): see tensorar.py
Command:   arcond train --config magvit2_xl --workdir runs/magvit2_xl
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/lfq256
Hardware:  not yet run
Score:     not yet run; official weights in the official code: FID 2.33
"""

from arcond_jax import build
from arcond_jax.configs import magvit2_b, tensorar


def get_config(variant: str = "") -> build.Config:
    return tensorar.of(
        magvit2_b.sized(
            "magvit2_xl",
            "XL",
            guidance_scales=(1.75, 1.85),
            temperatures=(1.1, 1.0),
            num_epochs=350,
            learning_rate=0.00024,
        ),
        variant,
    )
