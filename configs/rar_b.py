"""RAR-B on ImageNet 256x256: random orders annealed to raster order, 261M parameters.

Paper:     Yu et al. (2024), "Randomized Autoregressive Visual Generation"
Recipe:    configs/training/generator/rar.yaml of bytedance/1d-tokenizer: 400 epochs at 2,048
           images, AdamW (0.9, 0.96), 4e-4 after 100 epochs of warm-up, by half a cosine to 1e-5,
           weight decay 0.03, clipping at 1, dropout 0.1, no average, ten crops; all orders random
           until epoch 200, none from epoch 300 on
Sampling:  guidance to 16 along a cosine of power 2.75, temperature 1, no cuts
Variants:  tensorar_v1 (FID 1.92, paper), tensorar_iclr (ours), drafter (ours): see tensorar.py
Command:   arcond train --config rar_b --workdir runs/rar_b
             --config.data.directory=CODES --config.tokenizer.path=weights/maskgit_vq
Hardware:  not yet run
Score:     not yet run; official weights in the official code: FID 1.95
"""

from arcond_jax import build
from arcond_jax.configs import imagenet, tensorar
from arcond_jax.models import rar


def get_config(variant: str = "") -> build.Config:
    return tensorar.of(
        sized("rar_b", "B", guidance_scale=16.0, guidance_power=2.75, temperature=1.0), variant
    )


def sized(
    name: str, size: str, *, guidance_scale: float, guidance_power: float, temperature: float
) -> build.Config:
    """The recipe for one of the published sizes."""
    config = imagenet.of_codes("rar", "maskgit_vq", batch_size=2048, ten_crops=True)
    config.name = name
    config.model.update(**rar.SIZES[size], remat="full")
    config.loss.update(shuffle_start=125_000, shuffle_stop=187_500)
    config.training.update(
        num_train_steps=250_000,
        num_warmup_steps=62_500,
        learning_rate=4e-4,
        decay="cosine",
        decay_to=0.025,
        b2=0.96,
        weight_decay=0.03,
        clip_norm=1.0,
        ema_decay=0.0,
    )
    config.sampling.update(guidance_scale=guidance_scale, guidance_schedule="power_cosine")
    config.sampling.update(guidance_power=guidance_power, code_temperature=temperature)
    return config
