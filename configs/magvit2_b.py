"""Open-MAGVIT2-B on ImageNet 256x256: codes of 18 bits in two factors, 343M parameters.

Paper:     Luo et al. (2024), "Open-MAGVIT2"
Recipe:    configs/Open-MAGVIT2/gpu/imagenet_conditional_llama_B.yaml of TencentARC/SEED-Voken:
           300 epochs at 768 images, AdamW (0.9, 0.95), 0.0003 after 6 epochs of warm-up, along a
           line to a tenth, weight decay 0.05, clipping at 1, dropout 0.1 of tokens and branches.
           Departures: constant weight decay (there it falls to 0), an average of weights (0.9999)
Sampling:  guidance 1.9 for the first factor and 2 for the second, temperatures 1 and 1
Variants:  tensorar_v1 (FID 2.91, paper), tensorar_iclr, drafter (ours): see tensorar.py
Command:   arcond train --config magvit2_b --workdir runs/magvit2_b
             --config.data.directory=IMAGENET --config.tokenizer.path=weights/lfq256
Hardware:  not yet run
Score:     not yet run; official weights in the official code: FID 3.08
"""

from arcond_jax import build
from arcond_jax.configs import imagenet, tensorar
from arcond_jax.models import magvit2

STEPS_PER_EPOCH = imagenet.NUM_IMAGES // 768


def get_config(variant: str = "") -> build.Config:
    return tensorar.of(
        sized(
            "magvit2_b",
            "B",
            guidance_scales=(1.9, 2.0),
            temperatures=(1.0, 1.0),
            num_epochs=300,
            learning_rate=0.0003,
        ),
        variant,
    )


def sized(
    name: str,
    size: str,
    *,
    guidance_scales: tuple[float, float],
    temperatures: tuple[float, float],
    num_epochs: int,
    learning_rate: float,
) -> build.Config:
    """The recipe for one of the published sizes."""
    config = imagenet.of_codes("magvit2", "lfq", batch_size=768)
    config.name = name
    config.model.update(**magvit2.SIZES[size], dropout=0.1, remat="full")
    config.training.update(
        num_train_steps=num_epochs * STEPS_PER_EPOCH,
        num_warmup_steps=6 * STEPS_PER_EPOCH,
        learning_rate=learning_rate,
        decay="linear",
        decay_to=0.1,
        weight_decay=0.05,
        clip_norm=1.0,
    )
    config.sampling.guidance_scale, config.sampling.later_guidance_scale = guidance_scales
    config.sampling.code_temperature, config.sampling.later_code_temperature = temperatures
    return config
